//! Why a configuration is refused: file, line, key and reason, all faults at once.

use std::fmt;

use super::layers::Origin;
use crate::report::{Class, Report};

/// One fault of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory could not be read.
    #[error("cannot read the configuration {path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// The operating system's reason.
        reason: String,
        /// Its errno.
        errno: Option<i32>,
    },
    /// A file is not TOML.
    #[error("{place}: {reason}")]
    Syntax {
        /// File and line.
        place: Origin,
        /// The parser's reason.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key {key}{hint}", hint = Hint(.near))]
    Unknown {
        /// Where.
        place: Origin,
        /// The key, `section.name`.
        key: String,
        /// A known key that looks like it.
        near: Option<String>,
    },
    /// A key whose value cannot be used.
    #[error("{place}: {key} {reason}")]
    Invalid {
        /// Where.
        place: Origin,
        /// The key, `section.name`.
        key: String,
        /// What is wrong, completing a sentence that begins with the key.
        reason: String,
    },
}

struct Hint<'a>(&'a Option<String>);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(near) => write!(f, " (did you mean {near}?)"),
            None => Ok(()),
        }
    }
}

impl ConfigError {
    /// As people read it.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            ConfigError::Read { path, errno, .. } => {
                Report::new("config-unreadable", Class::Usage, text)
                    .path(path)
                    .errno(*errno)
                    .remedy("make the file readable, or name another one by --config")
            }
            ConfigError::Syntax { .. } => {
                Report::new("config-syntax", Class::Usage, text).remedy("correct this line")
            }
            ConfigError::Unknown { .. } => Report::new("config-unknown-key", Class::Usage, text)
                .remedy("correct or remove it; `crcoord config show` lists all keys"),
            ConfigError::Invalid { .. } => Report::new("config-invalid-value", Class::Usage, text)
                .remedy("correct the value; `crcoord config show` lists the present ones"),
        }
    }
}

/// All faults of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// As people read them.
    pub fn reports(&self) -> Vec<Report> {
        self.0.iter().map(ConfigError::report).collect()
    }
}
