//! A series: the parts of one job's member over its epochs, their packs, and the index from chunk to
//! place. Chunks are shared within a series and nowhere else.
//!
//! On disk a series is a directory `CLUSTER/ID@SUBMITTED/mM` with one directory `eN` for each part
//! and `.staging-eN-K` for each attempt to write one. A part appears by one rename of its directory
//! and disappears by the removal of its seal; a pack without a seal beside it belongs to a retired
//! part and stays while another part's seal names it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crcoord_common::ids::{Epoch, JobKey, MemberId, PartKey};
use crcoord_common::image::ChunkId;

use crate::chunk_index::{ChunkIndex, IndexedPack};
use crate::error::StoreError;
use crate::files;
use crate::pack::{Extent, Pack, Table};
use crate::seal::{self, PackUse, Sealed};

pub(crate) const PACK: &str = "pack";
pub(crate) const MANIFEST: &str = "manifest";
pub(crate) const SEAL: &str = "seal";
pub(crate) const COMMIT: &str = "commit";
pub(crate) const COMMIT_NEW: &str = ".commit-new";
const STAGING: &str = ".staging-";

/// Names a series.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SeriesKey {
    pub job: JobKey,
    pub member: MemberId,
}

/// One series and what is known of it.
#[derive(Debug)]
pub(crate) struct Series {
    key: SeriesKey,
    directory: PathBuf,
    loaded: bool,
    index: ChunkIndex,
    /// Packs that could not be indexed, or not as a whole, and why.
    impaired: BTreeMap<Epoch, StoreError>,
    stages: HashMap<u16, Stage>,
    next_stage: u16,
}

/// A part that is being written.
#[derive(Debug)]
struct Stage {
    directory: PathBuf,
    /// Packs that must not be removed meanwhile.
    pinned: BTreeSet<Epoch>,
    /// Packs worth referring to.
    dense: BTreeSet<Epoch>,
    /// Bytes referred to in each.
    uses: BTreeMap<Epoch, u64>,
}

/// What a stage should do about a chunk.
pub(crate) enum Noted {
    /// Nobody has it.
    Unknown,
    /// The part refers to it now.
    Referred,
    /// It lies in a pack that is mostly dead: copy it, so that the pack can go.
    Copy(Arc<Pack>, Extent),
}

impl Series {
    pub(crate) fn new(key: SeriesKey, directory: PathBuf) -> Self {
        Series {
            key,
            directory,
            loaded: false,
            index: ChunkIndex::default(),
            impaired: BTreeMap::new(),
            stages: HashMap::new(),
            next_stage: 0,
        }
    }

    /// The directory that holds its parts.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of a part.
    pub(crate) fn part_directory(&self, epoch: Epoch) -> PathBuf {
        self.directory.join(format!("e{epoch}"))
    }

    /// The epochs that have a directory here, sealed or not.
    pub(crate) fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let names = files::names(&self.directory)?;
        let mut epochs: Vec<Epoch> = names
            .iter()
            .filter_map(|name| name.strip_prefix('e')?.parse().ok().map(Epoch))
            .collect();
        epochs.sort_unstable();
        epochs.dedup();
        Ok(epochs)
    }

    /// The seal of an epoch's part; `None` where it is not (or no longer) sealed.
    pub(crate) fn seal(&self, epoch: Epoch) -> Result<Option<Sealed>, StoreError> {
        seal::read(
            &self.part_directory(epoch).join(SEAL),
            &self.part_key(epoch),
        )
    }

    pub(crate) fn part_key(&self, epoch: Epoch) -> PartKey {
        PartKey {
            job: self.key.job.clone(),
            epoch,
            member: self.key.member,
        }
    }

    /// Indexes the packs that were not known yet and forgets those that are gone.
    pub(crate) fn refresh(&mut self) -> Result<(), StoreError> {
        let epochs = self.epochs()?;
        let indexed = self.index.packs().map(|pack| pack.epoch);
        let gone: Vec<Epoch> = indexed.filter(|epoch| !epochs.contains(epoch)).collect();
        self.index.forget(&gone);
        self.loaded = true;
        // A pack that is indexed in part stays so; the others are tried again.
        let index = &self.index;
        self.impaired.retain(|epoch, _| index.has_pack(*epoch));
        for epoch in epochs {
            if !self.index.has_pack(epoch) {
                self.load(epoch);
            }
        }
        Ok(())
    }

    /// Where a chunk lies. Looks again on the disk where it is not known, and says why it is missing.
    pub(crate) fn find_anew(&mut self, id: &ChunkId) -> Result<(Arc<Pack>, Extent), StoreError> {
        if let Some(found) = self.index.find(id) {
            return Ok(found);
        }
        self.refresh()?;
        if let Some(found) = self.index.find(id) {
            return Ok(found);
        }
        Err(match self.impaired.first_key_value() {
            Some((_, error)) => error.clone(),
            None => StoreError::Missing {
                chunk: *id,
                path: self.directory.clone(),
            },
        })
    }

    /// What is known of the packs, for looking up.
    pub(crate) fn index(&mut self) -> &mut ChunkIndex {
        &mut self.index
    }

    /// Loads the index unless that is done.
    pub(crate) fn ensure_loaded(&mut self) -> Result<(), StoreError> {
        if self.loaded { Ok(()) } else { self.refresh() }
    }

    /// Begins a part: clears what dead attempts left, makes the staging directory, pins all packs.
    pub(crate) fn begin(&mut self, epoch: Epoch) -> Result<(u16, PathBuf), StoreError> {
        let target = self.part_directory(epoch);
        if target.exists() {
            return Err(StoreError::Exists { path: target });
        }
        files::create_directories(&self.directory)?;
        self.clear_leftovers(None)?;
        self.refresh()?;
        let directory = self.create_staging(epoch)?;
        let tag = self.free_tag();
        let stage = Stage {
            directory: directory.clone(),
            pinned: self.index.packs().map(|pack| pack.epoch).collect(),
            dense: self.dense_packs(epoch)?,
            uses: BTreeMap::new(),
        };
        self.stages.insert(tag, stage);
        Ok((tag, directory))
    }

    /// Lets a stage refer to a chunk.
    pub(crate) fn note(&mut self, tag: u16, id: &ChunkId) -> Noted {
        let (Some(place), Some(stage)) = (self.index.place(id), self.stages.get_mut(&tag)) else {
            return Noted::Unknown;
        };
        let epoch = place.pack.epoch;
        if !stage.dense.contains(&epoch) {
            return Noted::Copy(place.pack.pack.clone(), place.extent);
        }
        if *place.noted != tag {
            *place.noted = tag;
            *stage.uses.entry(epoch).or_default() += u64::from(place.extent.stored);
            stage.pinned.insert(epoch);
        }
        Noted::Referred
    }

    /// What a stage refers to so far. Every pack is checked to be still there.
    pub(crate) fn uses(&self, tag: u16) -> Result<Vec<PackUse>, StoreError> {
        let uses = self.stages.get(&tag).map(|stage| &stage.uses);
        let mut list = Vec::new();
        for (epoch, bytes) in uses.into_iter().flatten() {
            let path = self.part_directory(*epoch).join(PACK);
            fs::metadata(&path).map_err(|error| StoreError::io("refer to", &path, &error))?;
            list.push(PackUse {
                epoch: *epoch,
                bytes: *bytes,
            });
        }
        Ok(list)
    }

    /// Takes over the pack of a part that was just sealed.
    pub(crate) fn adopt(&mut self, epoch: Epoch, pack: Pack, table: Table) {
        self.index.mend(table.keys());
        self.index.insert(epoch, pack, table);
    }

    /// Ends a stage, sealed or not.
    pub(crate) fn end(&mut self, tag: u16) {
        self.stages.remove(&tag);
    }

    /// Removes staging directories that no stage of this process uses: all, or one epoch's.
    pub(crate) fn clear_leftovers(&self, epoch: Option<Epoch>) -> Result<(), StoreError> {
        let prefix = match epoch {
            Some(epoch) => format!("{STAGING}e{epoch}-"),
            None => STAGING.to_owned(),
        };
        for name in files::names(&self.directory)? {
            let path = self.directory.join(&name);
            let active = self.stages.values().any(|stage| stage.directory == path);
            if name.starts_with(&prefix) && !active {
                tracing::warn!(path = %path.display(), "removing an interrupted part");
                files::remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Removes retired parts' files and every pack that no sealed part and no stage needs. Gives
    /// the bytes freed.
    pub(crate) fn collect(&mut self) -> Result<u64, StoreError> {
        let (mut retired, mut live, mut all_known) = (Vec::new(), BTreeSet::new(), true);
        for epoch in self.epochs()? {
            match self.seal(epoch) {
                Ok(Some(sealed)) => {
                    live.insert(epoch);
                    live.extend(sealed.uses.iter().map(|used| used.epoch));
                }
                Ok(None) => retired.push(epoch),
                Err(error) => {
                    tracing::warn!(%error, "a seal cannot be read: no pack of its series is removed");
                    all_known = false;
                }
            }
        }
        live.extend(self.stages.values().flat_map(|stage| &stage.pinned));
        let (mut freed, mut gone) = (0, Vec::new());
        for epoch in retired {
            let directory = self.part_directory(epoch);
            let mut files = vec![MANIFEST, COMMIT, COMMIT_NEW];
            if all_known && !live.contains(&epoch) {
                files.push(PACK);
                gone.push(epoch);
            }
            for name in files {
                let path = directory.join(name);
                let length = fs::metadata(&path).map_or(0, |metadata| metadata.len());
                if files::remove_file(&path)? {
                    freed += length;
                }
            }
            if gone.last() == Some(&epoch) {
                // A file that is not ours keeps its directory.
                let _ = fs::remove_dir(&directory);
            }
        }
        if self.index.forget(&gone) {
            self.refresh()?;
        }
        if self.stages.is_empty() && self.directory.exists() {
            self.remove_empty_directories();
        }
        Ok(freed)
    }

    /// Drops the index where no stage needs it.
    pub(crate) fn release_memory(&mut self) {
        if self.stages.is_empty() {
            self.loaded = false;
            self.index.clear();
            self.impaired.clear();
        }
    }

    /// The packs of which the newest earlier part needs at least half. Chunks in others are written
    /// again: so a part's packs together are at most about twice its size however long a job runs,
    /// and no pack lives for the sake of one page.
    fn dense_packs(&self, before: Epoch) -> Result<BTreeSet<Epoch>, StoreError> {
        for epoch in self.epochs()?.into_iter().rev().filter(|e| *e < before) {
            // A damaged seal says nothing; the one before it may.
            let Ok(Some(sealed)) = self.seal(epoch) else {
                continue;
            };
            let used = |pack: &&IndexedPack| {
                let used = sealed.uses.iter().find(|used| used.epoch == pack.epoch);
                used.is_some_and(|used| used.bytes.saturating_mul(2) >= pack.bytes)
            };
            let packs = self.index.packs();
            return Ok(packs.filter(used).map(|pack| pack.epoch).collect());
        }
        Ok(BTreeSet::new())
    }

    fn load(&mut self, epoch: Epoch) {
        match self.open_pack(epoch) {
            Ok(Some((pack, table))) => self.index.insert(epoch, pack, table),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a pack is not indexed");
                self.impaired.insert(epoch, error);
            }
        }
    }

    fn open_pack(&mut self, epoch: Epoch) -> Result<Option<(Pack, Table)>, StoreError> {
        let path = self.part_directory(epoch).join(PACK);
        if !path.exists() {
            return Ok(None);
        }
        let (pack, table, whole) = match Pack::open(&path) {
            Ok((pack, table)) => (pack, table, true),
            Err(error @ StoreError::Damaged { .. }) => {
                let (pack, scan) = Pack::scan(&path)?;
                tracing::warn!(%error, chunks = scan.table.len(), "using what a scan found");
                self.impaired.insert(epoch, error);
                (pack, scan.table, false)
            }
            Err(error) => return Err(error),
        };
        if pack.owner() != Some(&self.part_key(epoch)) {
            let owner = pack.owner().map_or("no part".into(), PartKey::to_string);
            return Err(StoreError::foreign(&path, format!("it belongs to {owner}")));
        }
        // Without a readable seal the pack is judged by its own hashes alone.
        if let (true, Ok(Some(sealed))) = (whole, self.seal(epoch))
            && sealed.pack != pack.digest()
        {
            return Err(StoreError::foreign(
                &path,
                "it is not the pack that was sealed",
            ));
        }
        Ok(Some((pack, table)))
    }

    fn create_staging(&self, epoch: Epoch) -> Result<PathBuf, StoreError> {
        for attempt in 1u32.. {
            let path = self.directory.join(format!("{STAGING}e{epoch}-{attempt}"));
            if files::create_directory(&path)? {
                return Ok(path);
            }
        }
        unreachable!("a directory cannot hold 2^32 staging directories")
    }

    /// A tag that no stage has; 0 means none. When the numbers begin anew the old marks are wiped.
    fn free_tag(&mut self) -> u16 {
        loop {
            self.next_stage = self.next_stage.wrapping_add(1);
            if self.next_stage == 1 {
                self.index.wipe_notes();
            }
            if self.next_stage != 0 && !self.stages.contains_key(&self.next_stage) {
                return self.next_stage;
            }
        }
    }

    fn remove_empty_directories(&self) {
        // `rmdir` refuses a directory that is not empty: that is the condition.
        for directory in self.directory.ancestors().take(3) {
            if fs::remove_dir(directory).is_err() {
                return;
            }
        }
    }
}

/// The directory of a series below a store's root.
pub(crate) fn directory_of(root: &Path, key: &SeriesKey) -> PathBuf {
    root.join(key.job.cluster.as_str())
        .join(key.job.directory_name())
        .join(format!("m{}", key.member))
}

/// All series below a root, found by their directories' names.
pub(crate) fn all(root: &Path) -> Result<Vec<SeriesKey>, StoreError> {
    let mut keys = Vec::new();
    for cluster in files::names(root)? {
        let Ok(cluster_name) = cluster.parse() else {
            continue;
        };
        for job in files::names(&root.join(&cluster))? {
            let Some(key) = parse_job(&cluster_name, &job) else {
                continue;
            };
            for member in files::names(&root.join(&cluster).join(&job))? {
                let number = member.strip_prefix('m').and_then(|text| text.parse().ok());
                keys.extend(number.map(|number| SeriesKey {
                    job: key.clone(),
                    member: MemberId(number),
                }));
            }
        }
    }
    keys.sort();
    Ok(keys)
}

fn parse_job(cluster: &crcoord_common::ids::ClusterName, name: &str) -> Option<JobKey> {
    let (id, submitted) = name.rsplit_once('@')?;
    Some(JobKey {
        cluster: cluster.clone(),
        id: id.parse().ok()?,
        submitted: submitted.parse().ok()?,
    })
}
