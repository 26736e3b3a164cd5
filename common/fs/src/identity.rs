//! Which file a path or descriptor leads to.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A file's identity while it exists: device and inode (inode(7)). An inode number can be used again
/// after the file is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIdentity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl From<&Metadata> for FileIdentity {
    fn from(metadata: &Metadata) -> Self {
        FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// True when a path as process `pid` sees it (its root and mounts) leads to this file.
pub fn leads_to(pid: i32, path: &str, file: FileIdentity) -> io::Result<bool> {
    let seen = format!("/proc/{pid}/root{path}");
    Ok(FileIdentity::from(&std::fs::metadata(Path::new(&seen))?) == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_another_one() {
        let directory = std::env::temp_dir().join(format!("crcoord-fs-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("file");
        std::fs::write(&path, "old").unwrap();
        let open = std::fs::File::open(&path).unwrap();
        let identity = FileIdentity::from(&open.metadata().unwrap());
        let pid = std::process::id() as i32;
        let text = path.to_str().unwrap();
        assert!(leads_to(pid, text, identity).unwrap());
        std::fs::write(directory.join("new"), "new").unwrap();
        std::fs::rename(directory.join("new"), &path).unwrap();
        assert!(!leads_to(pid, text, identity).unwrap());
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(leads_to(pid, text, identity).is_err());
    }
}
