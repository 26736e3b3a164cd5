//! A stand-alone image: one part in a directory of its own, `manifest` and `pack`, without a store.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crcoord_common::image::{ChunkId, manifest};

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::files;
use crate::pack::{Pack, Table};
use crate::pack_writer::PackWriter;
use crate::series::{MANIFEST, PACK};
use crate::staged::locked;
use crate::store::{ChunkSink, ChunkSource, PutOutcome};

const PACK_PARTIAL: &str = ".pack.partial";
const MANIFEST_PARTIAL: &str = ".manifest.partial";
/// A manifest's header and authenticator, with room for later versions, in bytes.
const FRAME_LIMIT: u64 = 4096;

/// A whole image, open for reading.
#[derive(Debug)]
pub struct ImageDirectory {
    directory: PathBuf,
    manifest: Vec<u8>,
    pack: Pack,
    table: Table,
}

impl ImageDirectory {
    /// Begins an image. The directory is created where it is absent; one that holds an image, whole
    /// or not, or that another process writes into, is refused.
    pub fn create(directory: &Path) -> Result<ImageWriter, StoreError> {
        ImageWriter::begin(directory)
    }

    /// Opens an image that was written to its end.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let missing = |missing| StoreError::NoImage {
            path: directory.to_owned(),
            missing,
        };
        let limit = manifest::BODY_LIMIT + FRAME_LIMIT;
        let manifest = files::read_limited(&directory.join(MANIFEST), limit)?
            .ok_or_else(|| missing(MANIFEST))?;
        let path = directory.join(PACK);
        if !path.exists() {
            return Err(missing(PACK));
        }
        let (pack, table) = Pack::open(&path)?;
        if let Some(owner) = pack.owner() {
            return Err(StoreError::foreign(&path, format!("it belongs to {owner}")));
        }
        Ok(ImageDirectory {
            directory: directory.to_owned(),
            manifest,
            pack,
            table,
        })
    }

    /// The encoded manifest, as it lies there: decode it with the key that the caller expects.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// How many chunks the pack has.
    pub fn chunks(&self) -> u64 {
        self.table.len() as u64
    }

    /// Length of the pack, in bytes.
    pub fn stored_bytes(&self) -> u64 {
        self.pack.length()
    }
}

impl ChunkSource for ImageDirectory {
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        match self.table.get(&id) {
            Some(extent) => self.pack.read(id, *extent),
            None => Err(StoreError::Missing {
                chunk: id,
                path: self.directory.join(PACK),
            }),
        }
    }
}

/// An image that is being written. Dropped without a seal it leaves nothing.
#[derive(Debug)]
pub struct ImageWriter {
    directory: PathBuf,
    /// True where the directory was made for this image.
    created: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(Box<PackWriter>),
    Sealed,
    Failed(StoreError),
}

impl ImageWriter {
    fn begin(directory: &Path) -> Result<Self, StoreError> {
        let created = !directory.exists();
        files::create_directories(directory)?;
        let path = directory.join(PACK_PARTIAL);
        let file = files::open_or_create(&path)?;
        // The lock dies with its process, so a partial file without one is a dead dump's.
        files::lock(&file, &path)?;
        for name in [MANIFEST, PACK] {
            let path = directory.join(name);
            if path.exists() {
                // The partial file was made just now: an image there was finished without it.
                files::remove_file(&directory.join(PACK_PARTIAL))?;
                return Err(StoreError::Exists { path });
            }
        }
        let examine = |error| StoreError::io("examine", &path, &error);
        let (ours, named) = (file.metadata().map_err(examine)?, fs::metadata(&path));
        if named.map_err(examine)?.ino() != ours.ino() {
            return Err(StoreError::InUse { path });
        }
        file.set_len(0)
            .map_err(|error| StoreError::io("truncate", &path, &error))?;
        files::remove_file(&directory.join(MANIFEST_PARTIAL))?;
        let writer = PackWriter::over(file, &path, None);
        Ok(ImageWriter {
            directory: directory.to_owned(),
            created,
            state: Mutex::new(State::Open(Box::new(writer))),
        })
    }

    /// Makes the image whole and durable with this encoded manifest; gives the pack's length. The
    /// manifest gets its name last: a directory without one is no image.
    pub fn seal(&self, manifest: &[u8]) -> Result<u64, StoreError> {
        let mut state = locked(&self.state);
        let writer = match std::mem::replace(&mut *state, State::Failed(self.ended())) {
            State::Open(writer) => writer,
            State::Failed(error) => {
                *state = State::Failed(error.clone());
                return Err(error);
            }
            State::Sealed => {
                *state = State::Sealed;
                return Err(self.ended());
            }
        };
        let result = self.write_names(*writer, manifest);
        *state = match &result {
            Ok(_) => State::Sealed,
            Err(error) => State::Failed(error.clone()),
        };
        result
    }

    fn write_names(&self, writer: PackWriter, manifest: &[u8]) -> Result<u64, StoreError> {
        let at = |name| self.directory.join(name);
        let (pack, _locked_file) = writer.finish_keeping_file()?;
        files::write_new(&at(MANIFEST_PARTIAL), manifest)?;
        files::rename(&at(PACK_PARTIAL), &at(PACK))?;
        let named = files::sync_directory(&self.directory)
            .and_then(|()| files::rename(&at(MANIFEST_PARTIAL), &at(MANIFEST)))
            .and_then(|()| files::sync_directory(&self.directory));
        if named.is_err() {
            // Half an image is worse than none. The first error is the one to tell.
            let _ = files::remove_file(&at(MANIFEST));
            let _ = files::remove_file(&at(PACK));
        }
        named.map(|()| pack.length)
    }

    fn with_pack<T>(
        &self,
        work: impl FnOnce(&mut PackWriter) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut state = locked(&self.state);
        let result = match &mut *state {
            State::Open(writer) => work(writer),
            State::Failed(error) => return Err(error.clone()),
            State::Sealed => return Err(self.ended()),
        };
        if let Err(error) = &result {
            *state = State::Failed(error.clone());
        }
        result
    }

    fn ended(&self) -> StoreError {
        StoreError::Ended {
            path: self.directory.clone(),
        }
    }
}

impl ChunkSink for ImageWriter {
    fn note_known(&self, id: ChunkId) -> Result<bool, StoreError> {
        self.with_pack(|pack| Ok(pack.contains(&id)))
    }

    fn append(&self, chunk: &EncodedChunk) -> Result<PutOutcome, StoreError> {
        self.with_pack(|pack| {
            let before = pack.length();
            Ok(if pack.append(chunk)? {
                PutOutcome::New(pack.length() - before)
            } else {
                PutOutcome::Known
            })
        })
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if matches!(*locked(&self.state), State::Sealed) {
            return;
        }
        for name in [PACK_PARTIAL, MANIFEST_PARTIAL] {
            if let Err(error) = files::remove_file(&self.directory.join(name)) {
                tracing::warn!(%error, "an abandoned image leaves a partial file");
            }
        }
        if self.created {
            // Refused where somebody has put something else there, which is right.
            let _ = fs::remove_dir(&self.directory);
        }
    }
}
