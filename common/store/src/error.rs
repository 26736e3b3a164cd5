//! What can go wrong in an image store, and how it reaches a user.

use std::io;
use std::path::{Path, PathBuf};

use crcoord_common::ids::{ObjectId, PartKey};
use crcoord_common::image::ChunkId;
use crcoord_common::report::{Class, Report};

/// An error of a store, a pack or an image directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The filesystem has no room left, or the quota is used up.
    #[error("no space left to {action} {}", path.display())]
    Full {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {detail}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error number, where there is one.
        errno: Option<i32>,
        /// The kernel's words.
        detail: String,
    },
    /// Another process holds the store or writes this image.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The store or file.
        path: PathBuf,
    },
    /// There is an image or part already; it is never overwritten.
    #[error("{} exists already", path.display())]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// The store was opened to read only.
    #[error("the store {} was opened to read only", path.display())]
    ReadOnly {
        /// The store.
        path: PathBuf,
    },
    /// The store does not hold this part, or it is not sealed.
    #[error("the store holds no sealed part for {part}")]
    NoPart {
        /// The part.
        part: PartKey,
    },
    /// A directory holds no whole image.
    #[error("{} holds no whole image: there is no {missing}", path.display())]
    NoImage {
        /// The directory.
        path: PathBuf,
        /// The file that should be there.
        missing: &'static str,
    },
    /// A file's content is not what it must be.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file is of another kind or belongs to another part.
    #[error("{} is foreign: {what}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// A newer crcoord wrote the file.
    #[error("{} needs a reader of format {needed}, this one knows {known}", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// The format it asks for.
        needed: u16,
        /// The format this reader knows.
        known: u16,
    },
    /// A chunk is not where it is needed.
    #[error("chunk {chunk} is not in {}", path.display())]
    Missing {
        /// The chunk.
        chunk: ChunkId,
        /// The store or image that was searched.
        path: PathBuf,
    },
    /// A chunk that was offered is not what it claims to be.
    #[error("chunk {chunk} is refused: {what}")]
    BadChunk {
        /// Its claimed id.
        chunk: ChunkId,
        /// What is wrong with it.
        what: String,
    },
    /// Pages that were offered do not fit their description.
    #[error("pages of object {object}, window {window} are refused: {what}")]
    BadRun {
        /// The memory object.
        object: ObjectId,
        /// The window.
        window: u64,
        /// What is wrong with them.
        what: &'static str,
    },
    /// The staged part was sealed, or failed before.
    #[error("the staged part {} has ended and takes nothing more", path.display())]
    Ended {
        /// Its directory.
        path: PathBuf,
    },
    /// The part is committed by another record.
    #[error("{part} is committed by another record")]
    CommitConflict {
        /// The part.
        part: PartKey,
    },
    /// A sink or source outside this crate failed.
    #[error("{0}")]
    Other(Box<Report>),
}

impl StoreError {
    /// An I/O error as this enum names it; a full filesystem gets its own variant.
    pub(crate) fn io(action: &'static str, path: &Path, error: &io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::Full { action, path }
            }
            _ => StoreError::Io {
                action,
                path,
                errno: error.raw_os_error(),
                detail: error.to_string(),
            },
        }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        StoreError::Damaged {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn foreign(path: &Path, what: impl Into<String>) -> Self {
        StoreError::Foreign {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    /// The error as it crosses the wire.
    pub fn report(&self) -> Report {
        let (code, class, remedy) = self.code();
        let report = match self {
            StoreError::Other(report) => return (**report).clone(),
            _ => Report::new(code, class, self.to_string()).remedy(remedy),
        };
        match self {
            StoreError::Io { path, errno, .. } => {
                report.path(path.display().to_string()).errno(*errno)
            }
            StoreError::Full { path, .. }
            | StoreError::InUse { path }
            | StoreError::Exists { path }
            | StoreError::ReadOnly { path }
            | StoreError::NoImage { path, .. }
            | StoreError::Damaged { path, .. }
            | StoreError::Foreign { path, .. }
            | StoreError::TooNew { path, .. }
            | StoreError::Missing { path, .. }
            | StoreError::Ended { path } => report.path(path.display().to_string()),
            _ => report,
        }
    }

    fn code(&self) -> (&'static str, Class, &'static str) {
        use Class::{Failure, NotFound};
        match self {
            StoreError::Full { .. } => (
                "store-full",
                Failure,
                "free space there or point the store at another filesystem",
            ),
            StoreError::Io { .. } => (
                "store-io",
                Failure,
                "look at the filesystem and its kernel log",
            ),
            StoreError::InUse { .. } => (
                "store-in-use",
                Failure,
                "stop the other process or choose another directory",
            ),
            StoreError::Exists { .. } => (
                "store-exists",
                Failure,
                "choose another directory or remove this one first",
            ),
            StoreError::ReadOnly { .. } => (
                "store-read-only",
                Failure,
                "ask the node's agent to change the store",
            ),
            StoreError::NoPart { .. } => (
                "store-no-part",
                NotFound,
                "list the epochs that the store holds",
            ),
            StoreError::NoImage { .. } => (
                "store-no-image",
                NotFound,
                "give the directory of an image that was written to its end",
            ),
            StoreError::Damaged { .. } => (
                "store-damaged",
                Failure,
                "restart from another copy or an older epoch and check the disk",
            ),
            StoreError::Foreign { .. } => (
                "store-foreign",
                Failure,
                "put back the file that belongs there",
            ),
            StoreError::TooNew { .. } => (
                "store-too-new",
                Failure,
                "use the crcoord version that wrote it, or a newer one",
            ),
            StoreError::Missing { .. } => (
                "store-missing",
                Failure,
                "restart from another copy or an older epoch",
            ),
            StoreError::BadChunk { .. } => ("store-bad-chunk", Failure, "send the chunk again"),
            StoreError::BadRun { .. } => (
                "store-bad-run",
                Failure,
                "report this as a defect of crcoord",
            ),
            StoreError::Ended { .. } => ("store-ended", Failure, "begin the part anew"),
            StoreError::CommitConflict { .. } => (
                "store-commit-conflict",
                Failure,
                "compare the coordinator's journal with the store's commit record",
            ),
            StoreError::Other(_) => ("store-other", Failure, ""),
        }
    }
}

impl From<Report> for StoreError {
    fn from(report: Report) -> Self {
        StoreError::Other(Box::new(report))
    }
}

impl From<StoreError> for Report {
    fn from(error: StoreError) -> Report {
        error.report()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_has_its_own_name() {
        let path = Path::new("/spool/pack");
        for errno in [28, 122] {
            let error = StoreError::io("write", path, &io::Error::from_raw_os_error(errno));
            assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
            let report = error.report();
            assert_eq!(report.code, "store-full");
            assert_eq!(report.place.path.as_deref(), Some("/spool/pack"));
            assert!(!report.remedy.is_empty());
        }
        let error = StoreError::io("write", path, &io::Error::from_raw_os_error(5));
        assert_eq!(error.report().errno, Some(5));
    }
}
