//! Retention: which committed epochs are given up after a commit.

use std::collections::BTreeSet;

use crcoord_common::ids::Epoch;

/// The epochs to retire, oldest first: all but the `keep` newest, but never the newest, never one
/// that is `in_use`, and none at all while an epoch is open that may refer to their chunks.
pub(crate) fn surplus(
    committed: &BTreeSet<Epoch>,
    keep: u32,
    open: bool,
    in_use: Option<Epoch>,
) -> Vec<Epoch> {
    if open {
        return Vec::new();
    }
    let keep = keep.max(1) as usize;
    let surplus = committed.len().saturating_sub(keep);
    let oldest = committed.iter().take(surplus).copied();
    oldest.filter(|epoch| Some(*epoch) != in_use).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epochs(numbers: &[u64]) -> BTreeSet<Epoch> {
        numbers.iter().copied().map(Epoch).collect()
    }

    #[test]
    fn the_newest_two_are_kept() {
        assert_eq!(surplus(&epochs(&[1, 3, 4]), 2, false, None), [Epoch(1)]);
        assert!(surplus(&epochs(&[3, 4]), 2, false, None).is_empty());
    }

    #[test]
    fn the_newest_is_kept_whatever_is_configured() {
        assert_eq!(surplus(&epochs(&[1, 2]), 0, false, None), [Epoch(1)]);
        assert!(surplus(&epochs(&[2]), 0, false, None).is_empty());
    }

    #[test]
    fn an_open_intent_and_a_restart_protect() {
        assert!(surplus(&epochs(&[1, 2, 3]), 2, true, None).is_empty());
        assert_eq!(
            surplus(&epochs(&[1, 2, 3, 4]), 2, false, Some(Epoch(1))),
            [Epoch(2)]
        );
    }
}
