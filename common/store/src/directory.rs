//! An image store in a directory: on a node's own disk, or shared by many nodes.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crcoord_common::ids::PartKey;
use crcoord_common::image::{ChunkId, Manifest, manifest};

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::files;
use crate::series::{self, COMMIT, COMMIT_NEW, MANIFEST, SEAL, Series, SeriesKey};
use crate::staged::{DirectoryStaged, locked};
use crate::store::{ImageStore, PartState, PartSummary, StagedPart};

const LOCK: &str = ".lock";
/// A manifest's header and authenticator, with room for later versions, in bytes.
const MANIFEST_FRAME_LIMIT: u64 = 4096;
/// Longest commit record that is kept, in bytes.
const COMMIT_LIMIT: u64 = 64 << 20;

/// Who uses the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This process alone: it takes the store's lock and clears up after its predecessor.
    Local,
    /// The agents of many nodes at once, without any lock: each writes and retires only parts of
    /// members that it runs, and no two of them the same member's.
    Shared,
    /// Somebody else: nothing is written, no lock is taken (for commands that look or restart by
    /// hand while the agent may be running or dead).
    ReadOnly,
}

/// The store. Cheap to share behind an `Arc`; all calls block on the disk.
pub struct DirectoryStore {
    root: PathBuf,
    kind: Kind,
    series: Mutex<HashMap<SeriesKey, Arc<Mutex<Series>>>>,
    /// Held for as long as the store is open.
    _lock: Option<File>,
}

impl DirectoryStore {
    /// Opens a store, creating its directory where it is absent (not for [`Kind::ReadOnly`]).
    pub fn open(root: &Path, kind: Kind) -> Result<Self, StoreError> {
        let mut lock = None;
        match kind {
            Kind::ReadOnly => {
                std::fs::read_dir(root).map_err(|error| StoreError::io("list", root, &error))?;
            }
            Kind::Shared => files::create_directories(root)?,
            Kind::Local => {
                files::create_directories(root)?;
                let path = root.join(LOCK);
                let file = files::open_or_create(&path)?;
                files::lock(&file, root)?;
                lock = Some(file);
            }
        }
        let store = DirectoryStore {
            root: root.to_owned(),
            kind,
            series: Mutex::new(HashMap::new()),
            _lock: lock,
        };
        if kind == Kind::Local {
            store.clear_up()?;
        }
        Ok(store)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Finishes removals and clears attempts that a crash interrupted.
    fn clear_up(&self) -> Result<(), StoreError> {
        for key in series::all(&self.root)? {
            let series = self.series(key);
            let mut series = locked(&series);
            series.clear_leftovers(None)?;
            series.collect()?;
        }
        Ok(())
    }

    fn series(&self, key: SeriesKey) -> Arc<Mutex<Series>> {
        let mut all = locked(&self.series);
        all.entry(key)
            .or_insert_with_key(|key| {
                let directory = series::directory_of(&self.root, key);
                Arc::new(Mutex::new(Series::new(key.clone(), directory)))
            })
            .clone()
    }

    fn series_of(&self, part: &PartKey) -> Arc<Mutex<Series>> {
        self.series(SeriesKey {
            job: part.job.clone(),
            member: part.member,
        })
    }

    fn directory_of(&self, part: &PartKey) -> PathBuf {
        locked(&self.series_of(part)).part_directory(part.epoch)
    }

    fn writable(&self) -> Result<(), StoreError> {
        match self.kind {
            Kind::ReadOnly => Err(StoreError::ReadOnly {
                path: self.root.clone(),
            }),
            Kind::Local | Kind::Shared => Ok(()),
        }
    }

    fn sealed(&self, part: &PartKey) -> Result<crate::seal::Sealed, StoreError> {
        locked(&self.series_of(part))
            .seal(part.epoch)?
            .ok_or_else(|| StoreError::NoPart { part: part.clone() })
    }
}

impl ImageStore for DirectoryStore {
    fn stage(&self, part: &PartKey) -> Result<Arc<dyn StagedPart>, StoreError> {
        self.writable()?;
        Ok(Arc::new(DirectoryStaged::begin(
            self.series_of(part),
            part,
        )?))
    }

    fn abort(&self, part: &PartKey) -> Result<(), StoreError> {
        self.writable()?;
        locked(&self.series_of(part)).clear_leftovers(Some(part.epoch))
    }

    fn known(&self, part: &PartKey, ids: &[ChunkId]) -> Result<Vec<bool>, StoreError> {
        let series = self.series_of(part);
        let mut series = locked(&series);
        series.ensure_loaded()?;
        Ok(ids.iter().map(|id| series.index().knows(id)).collect())
    }

    fn parts(&self) -> Result<Vec<PartSummary>, StoreError> {
        let mut parts = Vec::new();
        for key in series::all(&self.root)? {
            let series = self.series(key);
            let series = locked(&series);
            for epoch in series.epochs()? {
                parts.extend(summary(&series, &series.part_key(epoch))?);
            }
        }
        Ok(parts)
    }

    fn part(&self, part: &PartKey) -> Result<Option<PartSummary>, StoreError> {
        summary(&locked(&self.series_of(part)), part)
    }

    fn manifest(&self, part: &PartKey) -> Result<Vec<u8>, StoreError> {
        let sealed = self.sealed(part)?;
        let path = self.directory_of(part).join(MANIFEST);
        let limit = manifest::BODY_LIMIT + MANIFEST_FRAME_LIMIT;
        let bytes = files::read_limited(&path, limit)?
            .ok_or_else(|| StoreError::damaged(&path, "it is gone although its part is sealed"))?;
        if Manifest::digest(&bytes) != sealed.manifest {
            return Err(StoreError::damaged(
                &path,
                "it is not the manifest that was sealed",
            ));
        }
        Ok(bytes)
    }

    fn read_encoded(&self, part: &PartKey, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        let series = self.series_of(part);
        let (pack, extent) = locked(&series).find_anew(&id)?;
        pack.read(id, extent)
    }

    fn read(&self, part: &PartKey, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let series = self.series_of(part);
        let (pack, extent) = locked(&series).find_anew(&id)?;
        pack.read_raw(id, extent).inspect_err(|error| {
            if matches!(error, StoreError::Damaged { .. }) {
                locked(&series).index().mark_bad(id);
            }
        })
    }

    fn commit(&self, part: &PartKey, record: &[u8]) -> Result<(), StoreError> {
        self.writable()?;
        self.sealed(part)?;
        if let Some(known) = self.commit_record(part)? {
            return if known == record {
                Ok(())
            } else {
                Err(StoreError::CommitConflict { part: part.clone() })
            };
        }
        let directory = self.directory_of(part);
        let new = directory.join(COMMIT_NEW);
        files::remove_file(&new)?;
        let written = files::write_new(&new, record)
            .and_then(|()| files::rename(&new, &directory.join(COMMIT)));
        if written.is_err() {
            // The first error is the one to tell.
            let _ = files::remove_file(&new);
        }
        written?;
        files::sync_directory(&directory)
    }

    fn commit_record(&self, part: &PartKey) -> Result<Option<Vec<u8>>, StoreError> {
        files::read_limited(&self.directory_of(part).join(COMMIT), COMMIT_LIMIT)
    }

    fn remove(&self, part: &PartKey) -> Result<u64, StoreError> {
        self.writable()?;
        let series = self.series_of(part);
        let mut series = locked(&series);
        let directory = series.part_directory(part.epoch);
        // The part is gone once its seal is; the rest can be finished at any time later.
        if files::remove_file(&directory.join(SEAL))? {
            files::sync_directory(&directory)?;
        }
        series.collect()
    }

    fn release_memory(&self) {
        // A series that nobody else holds has no stage, so nothing is lost with it. One that is
        // busy is left for another time.
        locked(&self.series).retain(|_, series| {
            if let Ok(mut series) = series.try_lock() {
                series.release_memory();
            }
            Arc::strong_count(series) > 1
        });
    }

    fn free_bytes(&self) -> Result<u64, StoreError> {
        let statistics = rustix::fs::statvfs(&self.root)
            .map_err(|errno| StoreError::io("examine", &self.root, &errno.into()))?;
        Ok(statistics.f_bavail.saturating_mul(statistics.f_frsize))
    }
}

fn summary(series: &Series, part: &PartKey) -> Result<Option<PartSummary>, StoreError> {
    let summary = |state, sealed| {
        Some(PartSummary {
            part: part.clone(),
            state,
            sealed,
        })
    };
    Ok(match series.seal(part.epoch) {
        Ok(None) => None,
        Ok(Some(sealed)) => {
            let committed = series.part_directory(part.epoch).join(COMMIT).exists();
            let state = if committed {
                PartState::Committed
            } else {
                PartState::Sealed
            };
            summary(state, Some(sealed))
        }
        Err(error @ StoreError::Io { .. }) => return Err(error),
        Err(error) => summary(PartState::Damaged(error), None),
    })
}
