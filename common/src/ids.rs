//! The names and numbers by which everything in crcoord is known, each a type of its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest accepted job id or node name, in bytes.
pub const NAME_LIMIT: usize = 64;

/// A name that is empty, too long or holds a character outside `[A-Za-z0-9._-]`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {text:?} is not valid: use 1 to {NAME_LIMIT} of A-Z a-z 0-9 . _ - and no leading dot"
)]
pub struct InvalidName {
    /// What the name was meant to be, for example `node name`.
    pub what: &'static str,
    /// The offending text.
    pub text: String,
}

fn checked(what: &'static str, text: &str) -> Result<String, InvalidName> {
    let valid = !text.is_empty()
        && text.len() <= NAME_LIMIT
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(InvalidName {
            what,
            text: text.chars().take(NAME_LIMIT).collect(),
        })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text. It is safe as one path component.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                checked($what, text).map(Self)
            }
        }
        impl TryFrom<String> for $type {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }
        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// A job's id as its scheduler prints it: `42`, `42.0`, `42_7`.
    JobId,
    "job id"
);
name!(
    /// A node's name as the scheduler and the node's certificate have it.
    NodeName,
    "node name"
);
name!(
    /// The name of a cluster: part of every job's identity and of every certificate.
    ClusterName,
    "cluster name"
);

macro_rules! number {
    ($(#[$doc:meta])* $type:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $type(pub $inner);

        impl $type {
            /// The next one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A job's part on one node: 0 to members - 1, in the order of the job's node list. It stays
    /// the same when the member moves to another node.
    MemberId,
    u32
);
number!(
    /// One life of a job between restarts, counted from 1.
    Incarnation,
    u32
);
number!(
    /// One life of a coordinator's leadership, counted from 1.
    Term,
    u64
);
number!(
    /// One global checkpoint of a job, counted from 1 and never reused.
    Epoch,
    u64
);
number!(
    /// Pairs an answer with its request on one control stream.
    RequestId,
    u64
);
number!(
    /// An object of an image (a descriptor's open file, a mapping's memory): unique in one manifest.
    ObjectId,
    u32
);

/// A job's whole identity. Scheduler ids wrap, so the id alone does not name a job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobKey {
    /// The cluster that runs the job.
    pub cluster: ClusterName,
    /// The scheduler's id.
    pub id: JobId,
    /// When the job was submitted, in seconds since 1970-01-01 UTC.
    pub submitted: u64,
}

impl JobKey {
    /// One path component that names the job, `ID@SUBMITTED`.
    pub fn directory_name(&self) -> String {
        format!("{}@{}", self.id, self.submitted)
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.cluster, self.id, self.submitted)
    }
}

/// One member in one incarnation of its job: the address of every message about a tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberKey {
    /// The job.
    pub job: JobKey,
    /// The job's life in which this tree runs.
    pub incarnation: Incarnation,
    /// The job's part.
    pub member: MemberId,
}

impl fmt::Display for MemberKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}.{}", self.job, self.incarnation, self.member)
    }
}

/// One member's share of one epoch, as stores know it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PartKey {
    /// The job.
    pub job: JobKey,
    /// The epoch.
    pub epoch: Epoch,
    /// The member whose tree it holds.
    pub member: MemberId,
}

impl fmt::Display for PartKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} epoch {} member {}",
            self.job, self.epoch, self.member
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_path_components() {
        for good in ["42", "42.0", "42_7", "node-001", "a.b"] {
            assert_eq!(good.parse::<JobId>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", ".x", &"x".repeat(65), "ä"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_checked_when_decoded() {
        let bytes = rmp_serde::to_vec_named("../../etc").unwrap();
        assert!(rmp_serde::from_slice::<NodeName>(&bytes).is_err());
    }
}
