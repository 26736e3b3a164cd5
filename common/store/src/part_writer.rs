//! Turns pages, given in any order by many threads, into chunks for one or more sinks and into the
//! page indexes that a manifest names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::page_index::{Builder, Entry};
use crcoord_common::image::{ChunkId, MemoryEntry, PageRun, WINDOW_BYTES};
use rayon::prelude::*;

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::staged::locked;
use crate::store::{ChunkSink, PutOutcome};

/// Writes the memory of one part. A window that is given again replaces what it had before
/// (pre-copy).
pub struct PartWriter {
    page_size: u64,
    sinks: Vec<Arc<dyn ChunkSink>>,
    objects: Mutex<BTreeMap<ObjectId, Builder>>,
    given_bytes: AtomicU64,
    new_chunks: AtomicU64,
    known_chunks: AtomicU64,
    stored_bytes: AtomicU64,
}

/// How far a writer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteProgress {
    /// Bytes of pages given, uncompressed.
    pub given_bytes: u64,
    /// Chunks of pages that at least one sink had to take.
    pub new_chunks: u64,
    /// Chunks of pages that every sink knew.
    pub known_chunks: u64,
    /// Bytes that sinks stored, summed over the sinks.
    pub stored_bytes: u64,
}

impl PartWriter {
    /// A writer for pages of this size (a power of two from 4 KiB to 64 KiB) into all these sinks.
    pub fn new(page_size: u64, sinks: Vec<Arc<dyn ChunkSink>>) -> Self {
        PartWriter {
            page_size,
            sinks,
            objects: Mutex::new(BTreeMap::new()),
            given_bytes: AtomicU64::new(0),
            new_chunks: AtomicU64::new(0),
            known_chunks: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        }
    }

    /// Names an object, so that it has an entry even without any page.
    pub fn declare(&self, object: ObjectId) {
        locked(&self.objects).entry(object).or_default();
    }

    /// Takes the pages of one window: hashes, asks the sinks, compresses once, appends.
    pub fn put(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
        self.check(&run)?;
        if bytes.len() as u64 != run.bytes(self.page_size) {
            return Err(bad_run(&run, "their length does not match their number"));
        }
        let id = ChunkId::of(bytes);
        self.given_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if self.offer(id, bytes)? {
            self.new_chunks.fetch_add(1, Ordering::Relaxed);
        } else {
            self.known_chunks.fetch_add(1, Ordering::Relaxed);
        }
        self.enter(&run, id);
        Ok(())
    }

    /// Takes many windows on all of rayon's threads.
    pub fn put_all(&self, runs: &[(PageRun, &[u8])]) -> Result<(), StoreError> {
        runs.par_iter()
            .try_for_each(|(run, bytes)| self.put(*run, bytes))
    }

    /// Enters a window that is unchanged since an earlier epoch, by its chunk's id, without its
    /// bytes. False, and nothing entered, where a sink does not have the chunk: read the pages.
    pub fn keep(&self, run: PageRun, id: ChunkId) -> Result<bool, StoreError> {
        self.check(&run)?;
        for sink in &self.sinks {
            if !sink.note_known(id)? {
                return Ok(false);
            }
        }
        self.known_chunks.fetch_add(1, Ordering::Relaxed);
        self.enter(&run, id);
        Ok(true)
    }

    /// Takes a window out again whose pages are zero or gone now.
    pub fn forget(&self, object: ObjectId, window: u64) {
        if let Some(builder) = locked(&self.objects).get_mut(&object) {
            builder.remove(window);
        }
    }

    /// Writes the page indexes and gives the manifest's memory entries, in order of object. Then
    /// encode the manifest and seal the sinks.
    pub fn finish(&self) -> Result<Vec<MemoryEntry>, StoreError> {
        let objects = std::mem::take(&mut *locked(&self.objects));
        let mut entries = Vec::with_capacity(objects.len());
        for (object, builder) in objects {
            let root = builder.write(|id, node| self.offer(id, &node).map(|_| ()))?;
            entries.push(MemoryEntry {
                object,
                root,
                bytes: builder.pages() * self.page_size,
            });
        }
        Ok(entries)
    }

    /// How far it has come.
    pub fn progress(&self) -> WriteProgress {
        WriteProgress {
            given_bytes: self.given_bytes.load(Ordering::Relaxed),
            new_chunks: self.new_chunks.load(Ordering::Relaxed),
            known_chunks: self.known_chunks.load(Ordering::Relaxed),
            stored_bytes: self.stored_bytes.load(Ordering::Relaxed),
        }
    }

    /// Gives a chunk to the sinks that lack it; false where none did.
    fn offer(&self, id: ChunkId, bytes: &[u8]) -> Result<bool, StoreError> {
        let mut encoded: Option<EncodedChunk> = None;
        for sink in &self.sinks {
            if sink.note_known(id)? {
                continue;
            }
            let chunk = match &encoded {
                Some(chunk) => chunk,
                None => encoded.insert(EncodedChunk::encode_as(id, bytes)?),
            };
            if let PutOutcome::New(stored) = sink.append(chunk)? {
                self.stored_bytes.fetch_add(stored, Ordering::Relaxed);
            }
        }
        Ok(encoded.is_some())
    }

    fn enter(&self, run: &PageRun, chunk: ChunkId) {
        let entry = Entry {
            window: run.window,
            present: run.present,
            chunk,
        };
        locked(&self.objects)
            .entry(run.object)
            .or_default()
            .insert(entry);
    }

    fn check(&self, run: &PageRun) -> Result<(), StoreError> {
        if run.present == 0 {
            return Err(bad_run(run, "there is none"));
        }
        if u64::from(run.present) >> window_pages(self.page_size) != 0 {
            return Err(bad_run(
                run,
                "a window has not that many pages of this size",
            ));
        }
        Ok(())
    }
}

/// How many pages of this size a window has; none where the size is no page size.
pub(crate) fn window_pages(page_size: u64) -> u64 {
    WINDOW_BYTES.checked_div(page_size).unwrap_or(0).min(16)
}

fn bad_run(run: &PageRun, what: &'static str) -> StoreError {
    StoreError::BadRun {
        object: run.object,
        window: run.window,
        what,
    }
}
