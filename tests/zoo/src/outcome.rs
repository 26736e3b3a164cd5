//! How a program says why it failed: one sentence, gathered on the way up.

use std::fmt;

/// Why a check did not hold: the text after `FAIL: `.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

/// The result of a step of a program.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Failure(reason.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Turns foreign errors into a [`Failure`] that says what was tried.
pub trait Explain<T> {
    /// Adds `what` in front of the error.
    ///
    /// # Errors
    /// The failure, if `self` is one.
    fn explain(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> Explain<T> for Result<T, E> {
    fn explain(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }
}

impl<T> Explain<T> for Option<T> {
    fn explain(self, what: impl fmt::Display) -> Outcome<T> {
        self.ok_or_else(|| Failure(what.to_string()))
    }
}

/// Returns a [`Failure`] with the formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::Failure::new(format!($($reason)+)));
        }
    };
}

/// Returns a [`Failure`] that shows both values unless `found == expected`.
#[macro_export]
macro_rules! ensure_equal {
    ($found:expr, $expected:expr, $($what:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => if *found != *expected {
                return Err($crate::Failure::new(format!(
                    "{}: expected {:?}, found {:?}", format!($($what)+), expected, found,
                )));
            }
        }
    };
}
