//! The run lease of one tree, as the coordinator may count on its end.
//!
//! A renewal is sent in answer to a heartbeat. An agent that numbers its heartbeats counts the lease
//! from its *sending* of that heartbeat, so the coordinator, which counts from the receipt, is never
//! early, however late the renewal is read. An agent that does not number them counts from the
//! renewal's receipt: that is as late as the lease before it allows, so the end is counted double.

use crcoord_common::ids::RequestId;

use crate::time::Millis;

/// The end of all leases that may have been granted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct RunLease {
    until: Option<Millis>,
}

impl RunLease {
    /// A capsule reported itself at `now`: its first lease has begun by then.
    pub(crate) fn begun(&mut self, now: Millis, lease_ms: u64) {
        self.extend(now, lease_ms);
    }

    /// A renewal is sent in answer to heartbeat `number`, received at `now`.
    pub(crate) fn renewed(&mut self, now: Millis, number: RequestId, lease_ms: u64) {
        let times = match number {
            RequestId(0) => 2,
            _ => 1,
        };
        self.extend(now, times * lease_ms);
    }

    /// Another coordinator may have renewed it up to `now`.
    pub(crate) fn unknown_before(&mut self, now: Millis, lease_ms: u64) {
        self.extend(now, 2 * lease_ms);
    }

    /// From here on it has run out, if nothing is granted any more; `None` while no end is certain.
    pub(crate) fn end(&self) -> Option<Millis> {
        self.until
    }

    /// 1 % is added: two clocks do not run equally fast.
    fn extend(&mut self, from: Millis, lease_ms: u64) {
        let until = from.after(lease_ms + lease_ms / 100);
        self.until = Some(self.until.map_or(until, |known| known.max(until)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_renewal_counts_once_and_an_unnumbered_one_double() {
        let mut lease = RunLease::default();
        assert_eq!(lease.end(), None);
        lease.begun(Millis(100), 1_000);
        assert_eq!(lease.end(), Some(Millis(1_110)));
        lease.renewed(Millis(200), RequestId(7), 1_000);
        assert_eq!(lease.end(), Some(Millis(1_210)));
        lease.renewed(Millis(200), RequestId(0), 1_000);
        assert_eq!(lease.end(), Some(Millis(2_220)));
        lease.renewed(Millis(300), RequestId(8), 1_000);
        assert_eq!(
            lease.end(),
            Some(Millis(2_220)),
            "what was granted stays granted"
        );
    }
}
