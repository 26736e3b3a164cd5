//! Regular files and directories: path, flags, position, and what must still be true of a file at
//! restart.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_fs::identity::{FileIdentity, leads_to};
use crcoord_fs::rollback::{RollbackError, cut_back};
use crcoord_kernel::sys;
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext};
use crate::error::{Result, bad_image, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "file",
    object: ObjectKind::File,
    recognise: |_, description| {
        (description.is_type(REGULAR) || description.is_type(DIRECTORY))
            && description.name.starts_with('/')
            && !description.name.ends_with(DELETED)
            && !description.name.starts_with("/memfd:")
    },
    check,
    capture,
    open,
    finish: None,
};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
/// What the kernel appends to the name of a file without one.
pub const DELETED: &str = " (deleted)";
const ACCESS_MODE: u32 = 3;
/// O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC: meant once, when the program opened it.
const ONCE: u32 = 0o100 | 0o200 | 0o400 | 0o1000;
const O_LARGEFILE: u32 = 0o100_000;

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileImage {
    /// Object id.
    pub object: ObjectId,
    /// Path in the member's mount namespace.
    pub path: String,
    /// Open flags.
    pub flags: u32,
    /// Position; for a directory, the cookie of its next entry.
    pub position: i64,
    /// Type bits.
    pub kind: u32,
    /// Size at the cut, for a regular file that is open for writing.
    pub written_size: Option<u64>,
}

impl ImageRecord for FileImage {
    const KIND: &'static str = "file";
}

fn check(_: &CaptureContext<'_>, all: &[&Description]) -> Vec<Report> {
    let mut reports = Vec::new();
    for description in all {
        if let Err(report) = same_file(description.pid, &description.name, description) {
            reports.push(description.at(report));
        }
        if !description.info.locks.is_empty() {
            reports.push(
                description.at(obstacle(
                    "engine-file-lock",
                    "file locks and leases are not supported yet",
                )
                .remedy("release the lock before the checkpoint")),
            );
        }
    }
    reports
}

/// The path must still lead to the open file: else a restart would open another one.
fn same_file(pid: i32, path: &str, description: &Description) -> std::result::Result<(), Report> {
    let file = FileIdentity {
        device: description.device,
        inode: description.inode,
    };
    match leads_to(pid, path, file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(obstacle(
            "engine-file-replaced",
            "its path leads to another file by now",
        )
        .remedy("keep open files at their paths")),
        Err(error) => Err(obstacle(
            "engine-file-gone",
            format!("its path cannot be looked up: {error}"),
        )
        .remedy("keep open files at their paths")
        .errno(error.raw_os_error())),
    }
}

fn capture(context: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    let obstacles = check(context, all);
    if !obstacles.is_empty() {
        return Err(crate::EngineError(obstacles));
    }
    Ok(all
        .iter()
        .map(|description| {
            let writes = description.flags() & ACCESS_MODE != 0 && description.is_type(REGULAR);
            Record::encode(&FileImage {
                object: description.object,
                path: description.name.clone(),
                flags: description.flags(),
                position: description.info.position,
                kind: description.mode & 0o170_000,
                written_size: writes.then_some(description.size),
            })
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: FileImage = record.decode()?;
        let fd = image.open(context)?;
        context.keep(image.object, fd)?;
    }
    Ok(())
}

impl FileImage {
    fn open(&self, context: &RestoreContext<'_>) -> Result<OwnedFd> {
        if !self.path.starts_with('/') {
            return Err(bad_image("a file's path is not absolute")
                .path(&self.path)
                .into());
        }
        let file = open_as_owner(context, &self.path, self.flags & !(ONCE | O_LARGEFILE))?;
        let at = |report: Report| report.path(&self.path);
        let metadata = file
            .metadata()
            .map_err(|error| at(failure("fstat", &error)))?;
        if metadata.mode() & 0o170_000 != self.kind {
            return Err(at(obstacle(
                "engine-file-changed",
                "the file is of another type than at the checkpoint",
            )
            .remedy("put the file back"))
            .into());
        }
        if let Some(size) = self.written_size {
            cut_back(&file, size).map_err(|error| at(not_rolled_back(&error)))?;
        }
        const O_PATH: u32 = 0o10_000_000;
        if self.flags & O_PATH == 0 && self.position != 0 {
            let position = u64::try_from(self.position)
                .map_err(|_| at(bad_image("a file's position is negative")))?;
            (&file)
                .seek(SeekFrom::Start(position))
                .map_err(|error| at(failure("lseek", &error)))?;
        }
        Ok(file.into())
    }
}

fn not_rolled_back(error: &RollbackError) -> Report {
    let report = obstacle("engine-file-rollback", error.to_string());
    match error {
        RollbackError::Shorter { .. } => {
            report.remedy("put the file's content back, or restart from another epoch")
        }
        RollbackError::Io(error) => report.errno(error.raw_os_error()),
    }
}

/// Opens a path with the job owner's rights.
pub fn open_as_owner(context: &RestoreContext<'_>, path: &str, flags: u32) -> Result<File> {
    let root = context.root.as_ref().map(AsFd::as_fd);
    let open = || sys::open_in_root(root, path, flags);
    let opened = match &context.target.owner {
        Some(owner) => {
            crcoord_kernel::credentials::as_user(owner.uid, owner.gid, &owner.groups, open)
                .map_err(|error| failure("taking the owner's credentials", &error))?
        }
        None => open(),
    };
    opened.map_err(|error| {
        obstacle(
            "engine-file-open",
            format!("the file cannot be opened: {error}"),
        )
        .path(path)
        .errno(error.raw_os_error())
        .remedy("put the file back with its permissions")
        .into()
    })
}
