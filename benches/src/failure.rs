//! Why a bench could not be run. Nobody handles it; it is only told.

use std::fmt::Display;

/// The reason, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// Short form inside the benches.
pub type Result<T> = std::result::Result<T, Failure>;

/// Says what was being done when something failed.
pub trait Explain<T> {
    /// "WHAT: REASON".
    fn explain(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Explain<T> for std::result::Result<T, E> {
    fn explain(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }
}

impl<T> Explain<T> for Option<T> {
    fn explain(self, what: impl Display) -> Result<T> {
        self.ok_or_else(|| Failure(what.to_string()))
    }
}
