//! Durable small steps on files: private creation, exact reads within a limit, synchronised
//! directories.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use crate::error::StoreError;

const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// Creates a file that must not exist yet, readable by its owner only.
pub(crate) fn create_new(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StoreError::Exists {
                path: path.to_owned(),
            },
            _ => StoreError::io("create", path, &error),
        })
}

/// Opens a file for reading and writing, creating it (owner only) where it is absent.
pub(crate) fn open_or_create(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(path)
        .map_err(|error| StoreError::io("open", path, &error))
}

/// Opens a file for reading; `None` where there is none.
pub(crate) fn open_existing(path: &Path) -> Result<Option<File>, StoreError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("open", path, &error)),
    }
}

/// Takes the file's lock (flock(2)) or says that another process has it.
pub(crate) fn lock(file: &File, path: &Path) -> Result<(), StoreError> {
    use rustix::fs::{FlockOperation, flock};
    flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => StoreError::InUse {
            path: path.to_owned(),
        },
        _ => StoreError::io("lock", path, &errno.into()),
    })
}

/// Writes a new file and makes its content durable (its name is durable after [`sync_directory`]).
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = create_new(path)?;
    file.write_all(bytes)
        .map_err(|error| StoreError::io("write", path, &error))?;
    file.sync_all()
        .map_err(|error| StoreError::io("synchronise", path, &error))
}

/// Reads a whole file of at most `limit` bytes; `None` where there is none.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(file) = open_existing(path)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| StoreError::io("read", path, &error))?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::damaged(
            path,
            format!("it is longer than {limit} bytes"),
        ));
    }
    Ok(Some(bytes))
}

/// Renames within one filesystem. The caller synchronises the directories.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => StoreError::Exists {
            path: to.to_owned(),
        },
        _ => StoreError::io("rename", from, &error),
    })
}

/// Makes a directory's entries durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| StoreError::io("synchronise", path, &error))
}

/// Creates one directory, durably; `false` where it existed.
pub(crate) fn create_directory(path: &Path) -> Result<bool, StoreError> {
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Ok(()) => {
            if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
                sync_directory(parent)?;
            }
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(error) => Err(StoreError::io("create", path, &error)),
    }
}

/// Creates a directory and its parents, durably.
pub(crate) fn create_directories(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    let mut attempts = 0;
    loop {
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            create_directories(parent)?;
        }
        attempts += 1;
        match create_directory(path) {
            // Another thread or node removed the parent, which was empty, just now.
            Err(StoreError::Io { errno, .. })
                if errno == Some(Errno::NOENT.raw_os_error()) && attempts < 16 => {}
            result => return result.map(|_| ()),
        }
    }
}

/// Removes a file; one that is absent is fine.
pub(crate) fn remove_file(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("remove", path, &error)),
    }
}

/// Removes a directory with what is in it; one that is absent is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::io("remove", path, &error)),
    }
}

/// Names in a directory, sorted; empty where there is no directory. Names that are not UTF-8 are
/// not ours and are left out.
pub(crate) fn names(path: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", path, &error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| StoreError::io("list", path, &error))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}
