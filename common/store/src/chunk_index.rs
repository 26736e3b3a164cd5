//! The index of a series, in memory: chunk id to pack and place. Rebuilt from the packs at any time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crcoord_common::ids::Epoch;
use crcoord_common::image::ChunkId;

use crate::codec::Codec;
use crate::pack::{Extent, Pack, Table};

/// Packs and where their chunks lie.
#[derive(Debug, Default)]
pub(crate) struct ChunkIndex {
    packs: Vec<Option<IndexedPack>>,
    index: HashMap<ChunkId, Location>,
    /// Chunks found damaged: they are stored again by the next part that has them.
    bad: HashSet<ChunkId>,
}

/// A pack of the index.
#[derive(Debug)]
pub(crate) struct IndexedPack {
    /// Whose part's.
    pub epoch: Epoch,
    /// The open file.
    pub pack: Arc<Pack>,
    /// Stored bytes of all its chunks.
    pub bytes: u64,
    /// It holds chunks that another pack holds too.
    overlaps: bool,
}

/// 24 bytes, 56 with the id: there is one for every 64 KiB of a job's memory.
#[derive(Clone, Copy, Debug)]
struct Location {
    offset: u64,
    stored: u32,
    raw: u32,
    pack: u32,
    /// The last stage that counted this chunk; 0 for none.
    noted: u16,
    codec: Codec,
}

impl Location {
    fn extent(&self) -> Extent {
        Extent {
            offset: self.offset,
            stored: self.stored,
            raw: self.raw,
            codec: self.codec,
        }
    }
}

/// A chunk's place, given to a stage.
pub(crate) struct Place<'a> {
    pub pack: &'a IndexedPack,
    pub extent: Extent,
    /// The stage that counted the chunk last.
    pub noted: &'a mut u16,
}

impl ChunkIndex {
    /// All packs.
    pub(crate) fn packs(&self) -> impl Iterator<Item = &IndexedPack> {
        self.packs.iter().flatten()
    }

    /// True when the epoch's pack is indexed.
    pub(crate) fn has_pack(&self, epoch: Epoch) -> bool {
        self.packs().any(|pack| pack.epoch == epoch)
    }

    /// Where a chunk lies, to read it.
    pub(crate) fn find(&self, id: &ChunkId) -> Option<(Arc<Pack>, Extent)> {
        let location = self.index.get(id)?;
        let pack = self.packs.get(location.pack as usize)?.as_ref()?;
        Some((pack.pack.clone(), location.extent()))
    }

    /// True when a chunk is there and not known to be damaged.
    pub(crate) fn knows(&self, id: &ChunkId) -> bool {
        self.index.contains_key(id) && !self.bad.contains(id)
    }

    /// Where a chunk lies, to refer to it; `None` also where it is known to be damaged.
    pub(crate) fn place(&mut self, id: &ChunkId) -> Option<Place<'_>> {
        if self.bad.contains(id) {
            return None;
        }
        let location = self.index.get_mut(id)?;
        let pack = self.packs.get(location.pack as usize)?.as_ref()?;
        Some(Place {
            pack,
            extent: location.extent(),
            noted: &mut location.noted,
        })
    }

    /// Remembers that a chunk is damaged where it lies.
    pub(crate) fn mark_bad(&mut self, id: ChunkId) {
        self.bad.insert(id);
    }

    /// Takes that back for chunks that were stored again.
    pub(crate) fn mend<'a>(&mut self, ids: impl Iterator<Item = &'a ChunkId>) {
        if self.bad.is_empty() {
            return;
        }
        for id in ids {
            self.bad.remove(id);
        }
    }

    /// Indexes a pack; where another has a chunk too, this one's place counts from now on.
    pub(crate) fn insert(&mut self, epoch: Epoch, pack: Pack, table: Table) {
        let slot = self.packs.len() as u32;
        let (mut bytes, mut overlaps) = (0, false);
        self.index.reserve(table.len());
        for (id, extent) in table {
            bytes += u64::from(extent.stored);
            let location = Location {
                offset: extent.offset,
                stored: extent.stored,
                raw: extent.raw,
                pack: slot,
                noted: 0,
                codec: extent.codec,
            };
            overlaps |= self.index.insert(id, location).is_some();
        }
        self.packs.push(Some(IndexedPack {
            epoch,
            pack: Arc::new(pack),
            bytes,
            overlaps,
        }));
    }

    /// Forgets packs. True when everything was forgotten, because one of them hid chunks of another
    /// pack: read all packs again.
    pub(crate) fn forget(&mut self, gone: &[Epoch]) -> bool {
        let (mut slots, mut overlaps) = (HashSet::new(), false);
        for (slot, entry) in self.packs.iter_mut().enumerate() {
            if let Some(pack) = entry.take_if(|pack| gone.contains(&pack.epoch)) {
                overlaps |= pack.overlaps;
                slots.insert(slot as u32);
            }
        }
        if overlaps {
            self.clear();
        } else if !slots.is_empty() {
            self.index.retain(|_, at| !slots.contains(&at.pack));
        }
        overlaps
    }

    /// Forgets all packs and gives their memory back.
    pub(crate) fn clear(&mut self) {
        self.packs = Vec::new();
        self.index = HashMap::new();
    }

    /// Wipes the marks of all stages.
    pub(crate) fn wipe_notes(&mut self) {
        self.index.values_mut().for_each(|at| at.noted = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_per_chunk_is_what_format_md_says() {
        assert_eq!(size_of::<(ChunkId, Location)>(), 56);
        assert_eq!(size_of::<(ChunkId, Extent)>(), 56);
    }
}
