//! Putting a written file back to the cut, in place, so that hard links and other holders stay right.

use std::fs::File;
use std::io;

/// A file that cannot be put back.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// Content of the cut is missing.
    #[error("the file has {now} bytes, at the checkpoint it had {then}")]
    Shorter {
        /// Its size now, in bytes.
        now: u64,
        /// Its size at the cut, in bytes.
        then: u64,
    },
    /// fstat(2) or ftruncate(2) failed.
    #[error("the file cannot be cut back: {0}")]
    Io(#[from] io::Error),
}

/// Cuts off what was written behind the size of the cut; the restarted program writes it again. A
/// file of exactly that size is left alone, so this can be repeated.
///
/// Gives the number of bytes cut off. What lies before is not looked at.
pub fn cut_back(file: &File, then: u64) -> Result<u64, RollbackError> {
    let now = file.metadata()?.len();
    if now < then {
        return Err(RollbackError::Shorter { now, then });
    }
    if now > then {
        file.set_len(then)?;
    }
    Ok(now - then)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn what_is_behind_the_cut_goes() {
        let path = std::env::temp_dir().join(format!("crcoord-rollback-{}", std::process::id()));
        let mut options = File::options();
        let mut file = options
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(b"before|after").unwrap();
        assert_eq!(cut_back(&file, 7).unwrap(), 5);
        assert_eq!(cut_back(&file, 7).unwrap(), 0);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before|");
        assert!(matches!(
            cut_back(&file, 8),
            Err(RollbackError::Shorter { now: 7, then: 8 })
        ));
    }
}
