//! Lists of nodes as Slurm writes them, `n[001-500,7],login1`, in and out, order kept.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::NodeName;

/// Most nodes one list may name.
pub const NODES_LIMIT: usize = 65_536;
/// Longest text of a list, in bytes.
const TEXT_LIMIT: usize = 1 << 20;

/// Nodes in the order in which they were given. A node may occur more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostList(pub Vec<NodeName>);

/// A text that is not a list of nodes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a list of nodes: {reason}")]
pub struct InvalidHostList {
    /// The offending part.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

impl HostList {
    /// The nodes in natural order (`n2` before `n10`), each once: the shortest list of a set.
    pub fn sorted(nodes: impl IntoIterator<Item = NodeName>) -> Self {
        let mut nodes: Vec<_> = nodes.into_iter().collect();
        nodes.sort_by(|a, b| Numbered::of(a.as_str()).cmp(&Numbered::of(b.as_str())));
        nodes.dedup();
        HostList(nodes)
    }
}

impl FromStr for HostList {
    type Err = InvalidHostList;

    fn from_str(text: &str) -> Result<Self, InvalidHostList> {
        let mut nodes = Vec::new();
        if text.len() > TEXT_LIMIT {
            return Err(refuse(
                text,
                format!("it is longer than {TEXT_LIMIT} bytes"),
            ));
        }
        for item in items(text)? {
            let room = NODES_LIMIT - nodes.len();
            for name in expand(item, room)? {
                let name = name.parse::<NodeName>();
                nodes.push(name.map_err(|error| refuse(item, error.to_string()))?);
            }
        }
        Ok(HostList(nodes))
    }
}

impl TryFrom<String> for HostList {
    type Error = InvalidHostList;
    fn try_from(text: String) -> Result<Self, InvalidHostList> {
        text.parse()
    }
}

impl From<HostList> for String {
    fn from(list: HostList) -> String {
        list.to_string()
    }
}

impl fmt::Display for HostList {
    /// Folds neighbours that differ only in their last number; reads back as the same list.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        let mut rest = self.0.as_slice();
        while let Some(first) = rest.first() {
            let first = Numbered::of(first.as_str());
            let alike = rest
                .iter()
                .take_while(|node| Numbered::of(node.as_str()).folds_with(&first))
                .count()
                .max(1);
            let (group, after) = rest.split_at(alike);
            if !text.is_empty() {
                text.push(',');
            }
            match group {
                [only] => text.push_str(only.as_str()),
                _ => {
                    let ranges = ranges(group);
                    text.push_str(&format!("{}[{ranges}]{}", first.prefix, first.suffix));
                }
            }
            rest = after;
        }
        f.pad(&text)
    }
}

/// A name taken apart around its last number.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Numbered<'a> {
    prefix: &'a str,
    number: Option<u64>,
    /// Digits, with leading zeros.
    width: usize,
    suffix: &'a str,
}

impl<'a> Numbered<'a> {
    fn of(name: &'a str) -> Self {
        let end = name
            .rfind(|c: char| c.is_ascii_digit())
            .map_or(0, |at| at + 1);
        let start = name[..end]
            .rfind(|c: char| !c.is_ascii_digit())
            .map_or(0, |at| at + 1);
        // Longer numbers are part of the name: they would not survive arithmetic.
        let number = name[start..end].parse().ok().filter(|_| end - start <= 18);
        match number {
            Some(_) => Numbered {
                prefix: &name[..start],
                number,
                width: end - start,
                suffix: &name[end..],
            },
            None => Numbered {
                prefix: name,
                number: None,
                width: 0,
                suffix: "",
            },
        }
    }

    fn folds_with(&self, other: &Numbered<'_>) -> bool {
        self.number.is_some()
            && other.number.is_some()
            && (self.prefix, self.suffix) == (other.prefix, other.suffix)
    }
}

/// `001-003,7` for names that fold with each other.
fn ranges(group: &[NodeName]) -> String {
    let mut runs: Vec<(u64, u64, usize)> = Vec::new();
    for name in group {
        let Numbered { number, width, .. } = Numbered::of(name.as_str());
        let number = number.unwrap_or_default();
        match runs.last_mut() {
            // A range pads every number to the width of its first.
            Some((_, last, least))
                if *last + 1 == number && digits(number).max(*least) == width =>
            {
                *last = number;
            }
            _ => runs.push((number, number, width)),
        }
    }
    let texts: Vec<String> = runs
        .iter()
        .map(|(first, last, width)| match first == last {
            true => format!("{first:0width$}"),
            false => format!("{first:0width$}-{last:0width$}"),
        })
        .collect();
    texts.join(",")
}

fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// Splits at commas outside brackets.
fn items(text: &str) -> Result<Vec<&str>, InvalidHostList> {
    let mut items = Vec::new();
    let (mut start, mut inside) = (0, false);
    for (at, byte) in text.bytes().enumerate() {
        match (byte, inside) {
            (b'[', false) => inside = true,
            (b']', true) => inside = false,
            (b'[', true) | (b']', false) => {
                return Err(refuse(text, "brackets do not match".into()));
            }
            (b',', false) => {
                items.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err(refuse(text, "a bracket is not closed".into()));
    }
    items.push(&text[start..]);
    match items.iter().find(|item| item.is_empty()) {
        Some(_) => Err(refuse(text, "a name is empty".into())),
        None => Ok(items),
    }
}

/// The names of one item, at most `room`: every combination of its brackets, the last one fastest.
fn expand(item: &str, room: usize) -> Result<Vec<String>, InvalidHostList> {
    let mut names = vec![String::new()];
    let mut rest = item;
    let too_many = || refuse(item, format!("a list may name at most {NODES_LIMIT} nodes"));
    while let Some((plain, after)) = rest.split_once('[') {
        let (inner, after) = after
            .split_once(']')
            .ok_or_else(|| refuse(item, "a bracket is not closed".into()))?;
        let numbers = numbers(item, inner)?;
        if names.len().saturating_mul(numbers.len()) > room {
            return Err(too_many());
        }
        names = names
            .iter()
            .flat_map(|name| {
                numbers
                    .iter()
                    .map(move |number| format!("{name}{plain}{number}"))
            })
            .collect();
        rest = after;
    }
    if names.len() > room {
        return Err(too_many());
    }
    Ok(names.into_iter().map(|name| name + rest).collect())
}

/// The texts of `001-003,7`.
fn numbers(item: &str, inner: &str) -> Result<Vec<String>, InvalidHostList> {
    let mut texts = Vec::new();
    for range in inner.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| {
            let all = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            all.then(|| text.parse::<u64>().ok()).flatten()
        };
        let bounds = digits(first).zip(digits(last));
        let (low, high) = bounds
            .filter(|(low, high)| low <= high)
            .ok_or_else(|| refuse(item, format!("{range:?} is not a range of numbers")))?;
        if high - low >= (NODES_LIMIT - texts.len()) as u64 {
            return Err(refuse(
                item,
                format!("a list may name at most {NODES_LIMIT} nodes"),
            ));
        }
        let width = first.len();
        texts.extend((low..=high).map(|number| format!("{number:0width$}")));
    }
    Ok(texts)
}

fn refuse(text: &str, reason: String) -> InvalidHostList {
    InvalidHostList {
        text: text.chars().take(80).collect(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(text: &str) -> Vec<String> {
        let list: HostList = text.parse().unwrap();
        list.0.iter().map(NodeName::to_string).collect()
    }

    fn list(names: &[&str]) -> HostList {
        HostList(names.iter().map(|name| name.parse().unwrap()).collect())
    }

    #[test]
    fn lists_expand_in_order() {
        assert_eq!(names("n1"), ["n1"]);
        assert_eq!(
            names("n[001-003,7],login"),
            ["n001", "n002", "n003", "n7", "login"]
        );
        assert_eq!(names("n[9-11]"), ["n9", "n10", "n11"]);
        assert_eq!(
            names("r[1-2]n[08-09].ib"),
            ["r1n08.ib", "r1n09.ib", "r2n08.ib", "r2n09.ib"]
        );
        assert_eq!(names("n[001-500]").len(), 500);
    }

    #[test]
    fn lists_fold() {
        assert_eq!(list(&["n1", "n2", "n3", "n7"]).to_string(), "n[1-3,7]");
        assert_eq!(list(&["n08", "n09", "n10"]).to_string(), "n[08-10]");
        assert_eq!(list(&["n9", "n10"]).to_string(), "n[9-10]");
        assert_eq!(list(&["n09", "n10", "n100"]).to_string(), "n[09-10,100]");
        assert_eq!(
            list(&["a", "n1.x", "n2.x", "b"]).to_string(),
            "a,n[1-2].x,b"
        );
        let set = list(&["n10", "n9", "n2", "n2", "m"]);
        assert_eq!(HostList::sorted(set.0).to_string(), "m,n[2,9-10]");
    }

    #[test]
    fn wrong_lists_are_refused_by_name() {
        for bad in [
            "",
            ",",
            "n1,",
            "n[",
            "n]",
            "n[1",
            "n[]",
            "n[a]",
            "n[2-1]",
            "n[1-]",
            "n[[1]]",
            "a b",
            "n[1-999999999]",
            "n[1-999][1-999]",
            "n[1-65536],x",
            "../x",
            "n[99999999999999999999]",
        ] {
            assert!(bad.parse::<HostList>().is_err(), "{bad:?}");
        }
        let error = "n[2-1]".parse::<HostList>().unwrap_err().to_string();
        assert_eq!(
            error,
            "\"n[2-1]\" is not a list of nodes: \"2-1\" is not a range of numbers"
        );
    }

    proptest! {
        #[test]
        fn what_is_folded_expands_to_the_same(
            names in prop::collection::vec("[a-c]{0,1}[0-9]{1,3}(\\.[0-9a])?|x{1,2}", 1..40)
        ) {
            let list = HostList(names.iter().map(|name| name.parse().unwrap()).collect());
            let text = list.to_string();
            prop_assert_eq!(text.parse::<HostList>(), Ok(list), "{}", text);
        }

        #[test]
        fn no_text_panics(text in "[n0-9,\\[\\]-]{0,30}") {
            let _ = text.parse::<HostList>();
        }
    }
}
