//! A part that is being written into a directory store.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crcoord_common::ids::PartKey;
use crcoord_common::image::{ChunkId, Manifest};

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::files;
use crate::pack::Pack;
use crate::pack_writer::{FinishedPack, PackWriter};
use crate::seal::{self, PackUse, Sealed};
use crate::series::{MANIFEST, Noted, PACK, SEAL, Series};
use crate::store::{ChunkSink, ChunkSource, PutOutcome, StageProgress, StagedPart};

/// Locks even after a panic elsewhere: every change under these locks is complete in itself.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lock order: the state first, the series second; never the other way round.
pub(crate) struct DirectoryStaged {
    series: Arc<Mutex<Series>>,
    part: PartKey,
    tag: u16,
    directory: PathBuf,
    state: Mutex<State>,
}

enum State {
    Open(Box<PackWriter>),
    Sealed(StageProgress),
    /// What ended it; everything that follows fails likewise.
    Failed(StoreError),
}

impl DirectoryStaged {
    pub(crate) fn begin(series: Arc<Mutex<Series>>, part: &PartKey) -> Result<Self, StoreError> {
        let (tag, directory) = locked(&series).begin(part.epoch)?;
        // From here on the drop clears up.
        let staged = DirectoryStaged {
            series,
            part: part.clone(),
            tag,
            state: Mutex::new(State::Failed(StoreError::Ended {
                path: directory.clone(),
            })),
            directory,
        };
        let writer = PackWriter::create(&staged.directory.join(PACK), Some(part))?;
        *locked(&staged.state) = State::Open(Box::new(writer));
        Ok(staged)
    }

    /// Works on the open pack; an error ends the part.
    fn with_pack<T>(
        &self,
        work: impl FnOnce(&mut PackWriter) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut state = locked(&self.state);
        let result = match &mut *state {
            State::Open(writer) => work(writer),
            State::Failed(error) => return Err(error.clone()),
            State::Sealed(_) => return Err(self.ended()),
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

    fn write_seal(&self, manifest: &[u8], pack: FinishedPack) -> Result<Sealed, StoreError> {
        files::write_new(&self.directory.join(MANIFEST), manifest)?;
        let mut series = locked(&self.series);
        let mut uses = series.uses(self.tag)?;
        uses.push(PackUse {
            epoch: self.part.epoch,
            bytes: pack.table.values().map(|e| u64::from(e.stored)).sum(),
        });
        let sealed = Sealed {
            part: self.part.clone(),
            manifest: Manifest::digest(manifest),
            manifest_bytes: manifest.len() as u64,
            pack: pack.digest,
            stored_bytes: pack.length,
            raw_bytes: pack.raw_bytes,
            chunks: pack.table.len() as u64,
            uses,
        };
        seal::write(&self.directory.join(SEAL), &sealed)?;
        files::sync_directory(&self.directory)?;
        let target = series.part_directory(self.part.epoch);
        files::rename(&self.directory, &target)?;
        let opened = files::sync_directory(series.directory())
            .and_then(|()| Pack::open_finished(&target.join(PACK), pack.digest));
        match opened {
            Ok(reader) => {
                series.adopt(self.part.epoch, reader, pack.table);
                Ok(sealed)
            }
            Err(error) => {
                // Not known to be durable: not to be seen either.
                files::remove_file(&target.join(SEAL))?;
                series.collect()?;
                Err(error)
            }
        }
    }
}

impl ChunkSink for DirectoryStaged {
    fn note_known(&self, id: ChunkId) -> Result<bool, StoreError> {
        if self.with_pack(|pack| Ok(pack.contains(&id)))? {
            return Ok(true);
        }
        let noted = locked(&self.series).note(self.tag, &id);
        match noted {
            Noted::Unknown => Ok(false),
            Noted::Referred => Ok(true),
            Noted::Copy(pack, extent) => {
                let chunk = pack.read(id, extent);
                match chunk.and_then(|chunk| chunk.decode_verified().map(|_| chunk)) {
                    Ok(chunk) => self.append(&chunk).map(|_| true),
                    Err(error) => {
                        tracing::warn!(%error, "a stored chunk cannot be used again");
                        locked(&self.series).index().mark_bad(id);
                        Ok(false)
                    }
                }
            }
        }
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

impl ChunkSource for DirectoryStaged {
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        if let State::Open(pack) = &mut *locked(&self.state)
            && let Some(chunk) = pack.read(id)?
        {
            return Ok(chunk);
        }
        let (pack, extent) = locked(&self.series).find_anew(&id)?;
        pack.read(id, extent)
    }
}

impl StagedPart for DirectoryStaged {
    fn seal(&self, manifest: &[u8]) -> Result<Sealed, StoreError> {
        let mut state = locked(&self.state);
        let ended = State::Failed(self.ended());
        let writer = match std::mem::replace(&mut *state, ended) {
            State::Open(writer) => writer,
            other => {
                let error = match &other {
                    State::Failed(error) => error.clone(),
                    _ => self.ended(),
                };
                *state = other;
                return Err(error);
            }
        };
        let result = writer
            .finish()
            .and_then(|pack| self.write_seal(manifest, pack));
        *state = match &result {
            Ok(sealed) => State::Sealed(StageProgress {
                chunks: sealed.chunks,
                stored_bytes: sealed.stored_bytes,
                raw_bytes: sealed.raw_bytes,
            }),
            Err(error) => State::Failed(error.clone()),
        };
        result
    }

    fn progress(&self) -> StageProgress {
        match &*locked(&self.state) {
            State::Open(pack) => StageProgress {
                chunks: pack.chunks(),
                stored_bytes: pack.length(),
                raw_bytes: pack.raw_bytes(),
            },
            State::Sealed(progress) => *progress,
            State::Failed(_) => StageProgress::default(),
        }
    }
}

impl Drop for DirectoryStaged {
    fn drop(&mut self) {
        let ended = State::Failed(self.ended());
        // The file is closed first: an open one leaves a name behind on NFS.
        let sealed = matches!(
            std::mem::replace(&mut *locked(&self.state), ended),
            State::Sealed(_)
        );
        if !sealed && let Err(error) = files::remove_tree(&self.directory) {
            tracing::warn!(%error, "an abandoned part is left for the next clean-up");
        }
        locked(&self.series).end(self.tag);
    }
}
