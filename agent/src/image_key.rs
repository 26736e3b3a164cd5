//! The cluster's image key: read from its file, which only root may read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crcoord_common::image::SealingKey;
use crcoord_common::report::{Class, Report};

/// Why there is no usable key.
#[derive(Debug, thiserror::Error)]
pub enum ImageKeyError {
    /// It cannot be read.
    #[error("cannot read the image key {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Others than its owner may read it.
    #[error("image key {} has mode {mode:04o}: group or others may read it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not 64 hexadecimal digits.
    #[error("{} does not hold an image key of 64 hexadecimal digits", path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
}

impl ImageKeyError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let (code, path, remedy) = match self {
            ImageKeyError::Read { path, .. } => (
                "agent-image-key-read",
                path,
                "copy the cluster's image.key to this node",
            ),
            ImageKeyError::Open { path, .. } => {
                ("agent-image-key-open", path, "chmod 0600 the image key")
            }
            ImageKeyError::Form { path } => (
                "agent-image-key-form",
                path,
                "copy the cluster's image.key to this node again",
            ),
        };
        Report::new(code, Class::Obstacle, self.to_string())
            .path(path.display().to_string())
            .remedy(remedy)
    }
}

/// Loads the key.
///
/// # Errors
/// [`ImageKeyError`].
pub fn load(path: &Path) -> Result<SealingKey, ImageKeyError> {
    let read = |source| ImageKeyError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let mode = file.metadata().map_err(read)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ImageKeyError::Open {
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    file.take(256).read_to_string(&mut text).map_err(read)?;
    let form = || ImageKeyError::Form {
        path: path.to_owned(),
    };
    let text = text.trim();
    if text.len() != 64 || !text.is_ascii() {
        return Err(form());
    }
    let mut key = [0; 32];
    for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| form())?;
    }
    Ok(SealingKey::Keyed(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_private_file_of_the_right_form_is_a_key() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.key");
        assert!(matches!(load(&path), Err(ImageKeyError::Read { .. })));
        std::fs::write(&path, format!("{}\n", "0a".repeat(32))).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            load(&path),
            Err(ImageKeyError::Open { mode: 0o644, .. })
        ));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(load(&path), Ok(SealingKey::Keyed(key)) if key == [10; 32]));
        std::fs::write(&path, "0a".repeat(31)).unwrap();
        assert!(matches!(load(&path), Err(ImageKeyError::Form { .. })));
    }
}
