//! The listing that `zoo list` prints and harnesses read.

use std::fmt;

use crate::{Explain, Outcome};

/// What the engine of issue 2 has to do with a noun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Must survive checkpoint, kill and restart.
    Supported,
    /// May still be refused by name, before anything is frozen; never silently broken.
    Later,
}

impl fmt::Display for Fate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Fate::Supported => "supported",
            Fate::Later => "later",
        })
    }
}

/// One line of `zoo list`, as a harness sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The subcommand.
    pub name: String,
    /// The expected fate.
    pub fate: Fate,
    /// One line of purpose.
    pub purpose: String,
}

/// Parses the standard output of `zoo list`.
///
/// # Errors
/// A line that has not exactly three tab separated columns, or an unknown fate.
pub fn parse_listing(text: &str) -> Outcome<Vec<Entry>> {
    text.lines()
        .map(|line| {
            let columns: Vec<&str> = line.split('\t').collect();
            let [name, fate, purpose] = columns[..] else {
                return None.explain(format!("listing line {line:?} has not three columns"));
            };
            let fate = match fate {
                "supported" => Fate::Supported,
                "later" => Fate::Later,
                _ => return None.explain(format!("listing line {line:?} has an unknown fate")),
            };
            Ok(Entry {
                name: name.into(),
                fate,
                purpose: purpose.into(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_printed_and_refuses_the_rest() {
        let parsed = parse_listing("pipes\tsupported\tqueued data\nfifo\tlater\tnamed\n").unwrap();
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[1].fate, Fate::Later);
        assert!(parse_listing("pipes\tsupported\n").is_err());
        assert!(parse_listing("pipes\tmaybe\tx\n").is_err());
    }
}
