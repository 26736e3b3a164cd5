//! `Millis`: the machines' time, given from outside.

use std::fmt;

/// Milliseconds of a clock that never goes back, counted from the coordinator's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis(pub u64);

impl Millis {
    /// This much later, in milliseconds.
    #[must_use]
    pub fn after(self, milliseconds: u64) -> Self {
        Millis(self.0.saturating_add(milliseconds))
    }

    /// Milliseconds since `earlier`; 0 when that is in the future.
    pub fn since(self, earlier: Millis) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0)
    }
}

/// The earlier of two times that may be absent.
pub(crate) fn earlier(one: Option<Millis>, other: Option<Millis>) -> Option<Millis> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
