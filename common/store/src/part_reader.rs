//! Reads the memory of a part: walks its page indexes, verifies every chunk and hands out the pages,
//! with read-ahead; or verifies, lists and copies without using them.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, atomic::AtomicBool, atomic::Ordering};
use std::thread;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::page_index::{Entry, WalkError, walk_all};
use crcoord_common::image::{ChunkId, MemoryEntry, PageRun, WINDOW_BYTES};

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::part_writer::window_pages;
use crate::staged::locked;
use crate::store::{ChunkSink, ChunkSource};

/// Chunks that each thread may be ahead of the consumer.
const AHEAD: usize = 16;

/// The memory entries of one manifest and where their chunks come from.
pub struct PartReader<'a> {
    memory: &'a [MemoryEntry],
    page_size: u64,
    source: &'a dyn ChunkSource,
}

/// An error while reading: the image's or the consumer's own.
#[derive(Debug, thiserror::Error)]
pub enum ReadError<E> {
    /// The image cannot be read.
    #[error("object {object}{}: {error}", window_text(*window))]
    Image {
        /// The memory object.
        object: ObjectId,
        /// The window; `None` for the page index.
        window: Option<u64>,
        /// What is wrong.
        error: StoreError,
    },
    /// The consumer gave up.
    #[error("{0}")]
    Consumer(E),
}

/// What a chunk of a part is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkRole {
    /// A node of a page index.
    Node,
    /// Pages.
    Pages,
}

/// One thing that [`PartReader::verify`] found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The memory object.
    pub object: ObjectId,
    /// The window whose pages are lost; `None` where a node of the index is, and with it all
    /// windows after the last one that was checked.
    pub window: Option<u64>,
    /// What is wrong.
    pub error: StoreError,
}

/// What [`PartReader::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Nodes and chunks of pages that are there and right.
    pub good: u64,
    /// Uncompressed bytes of the good pages.
    pub bytes: u64,
    /// What is wrong: the first 1000.
    pub damage: Vec<Damage>,
    /// How many are wrong in all.
    pub damaged: u64,
}

const DAMAGE_LISTED: usize = 1000;

impl<'a> PartReader<'a> {
    /// A reader for the memory of a manifest whose pages have this size.
    pub fn new(memory: &'a [MemoryEntry], page_size: u64, source: &'a dyn ChunkSource) -> Self {
        PartReader {
            memory,
            page_size,
            source,
        }
    }

    /// Gives all pages, verified, to `visit` on the calling thread, in no particular order, while
    /// `threads` others read ahead. Holds at most about `threads` x 34 chunks of 64 KiB.
    pub fn read_all<E>(
        &self,
        threads: usize,
        mut visit: impl FnMut(PageRun, Vec<u8>) -> Result<(), E>,
    ) -> Result<(), ReadError<E>> {
        let mut first = None;
        self.read_ahead(threads, |found| {
            let result = match found {
                Found::Pages(run, Ok(bytes)) => visit(run, bytes).map_err(ReadError::Consumer),
                Found::Pages(run, Err(error)) => Err(ReadError::Image {
                    object: run.object,
                    window: Some(run.window),
                    error,
                }),
                Found::Node(_, Ok(())) => Ok(()),
                Found::Node(object, Err(error)) => Err(ReadError::Image {
                    object,
                    window: None,
                    error,
                }),
            };
            match result {
                Ok(()) => true,
                Err(error) => {
                    first = Some(error);
                    false
                }
            }
        });
        match first {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Reads and checks every node and chunk, and names what is missing or damaged.
    pub fn verify(&self, threads: usize) -> VerifyReport {
        let mut report = VerifyReport::default();
        self.read_ahead(threads, |found| {
            let (object, window, result) = match found {
                Found::Pages(run, result) => (
                    run.object,
                    Some(run.window),
                    result.map(|bytes| bytes.len() as u64),
                ),
                Found::Node(object, result) => (object, None, result.map(|()| 0)),
            };
            match result {
                Ok(bytes) => {
                    report.good += 1;
                    report.bytes += bytes;
                }
                Err(error) => {
                    report.damaged += 1;
                    if report.damage.len() < DAMAGE_LISTED {
                        report.damage.push(Damage {
                            object,
                            window,
                            error,
                        });
                    }
                }
            }
            true
        });
        report
    }

    /// Tells every chunk that the part needs: each node before what is below it, pages in order of
    /// address. A chunk that is used in several places is told each time.
    pub fn for_each_id(
        &self,
        mut visit: impl FnMut(ChunkRole, ChunkId) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut visit = |_: ObjectId, found: Need| match found {
            Need::Node(id) => visit(ChunkRole::Node, id),
            Need::Pages(entry) => visit(ChunkRole::Pages, entry.chunk),
        };
        for entry in self.memory {
            self.walk(entry, &mut visit)?;
        }
        Ok(())
    }

    /// Copies every chunk that the sink lacks, in its stored form, verified; gives the number
    /// copied. Seal the sink with the part's manifest afterwards.
    pub fn copy_to(&self, sink: &dyn ChunkSink, threads: usize) -> Result<u64, StoreError> {
        let (send, receive) = sync_channel::<ChunkId>(threads.max(1) * AHEAD);
        let receive = Mutex::new(receive);
        let failed = AtomicBool::new(false);
        let copy = || -> Result<u64, StoreError> {
            let mut copied = 0;
            while let Some(id) = next(&receive) {
                // After a failure the queue is drained, so that the walk ends.
                if failed.load(Ordering::Relaxed) || sink.note_known(id)? {
                    continue;
                }
                let chunk = self.source.encoded(id)?;
                let (codec, raw_length) = (chunk.codec as u8, chunk.raw_length);
                sink.append(&EncodedChunk::verified(id, codec, raw_length, chunk.bytes)?)?;
                copied += 1;
            }
            Ok(copied)
        };
        let copy = || {
            let result = copy();
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
                while next(&receive).is_some() {}
            }
            result
        };
        thread::scope(|scope| {
            let copiers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(copy)).collect();
            let walked = self.for_each_id(|_, id| {
                // A send fails only when all copiers ended, whose error is told below.
                let _ = send.send(id);
                Ok(())
            });
            drop(send);
            let mut copied = 0;
            let mut result = walked;
            for copier in copiers {
                match copier.join() {
                    Ok(Ok(count)) => copied += count,
                    Ok(Err(error)) => result = result.and(Err(error)),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result.map(|()| copied)
        })
    }

    /// Walks all indexes on one thread, reads pages on others, and gives everything to `take` on
    /// the calling thread until that returns false.
    fn read_ahead(&self, threads: usize, mut take: impl FnMut(Found) -> bool) {
        let threads = threads.max(1);
        let (want, wanted) = sync_channel::<PageRunOf>(threads * AHEAD);
        let (give, given) = sync_channel::<Found>(threads * AHEAD);
        let wanted = Mutex::new(wanted);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..threads {
                let give = give.clone();
                let (wanted, stop) = (&wanted, &stop);
                scope.spawn(move || {
                    while let Some((run, id)) = next(wanted) {
                        // After a stop the queue is only drained, so that the walk can end.
                        if !stop.load(Ordering::Relaxed)
                            && give.send(Found::Pages(run, self.pages(&run, id))).is_err()
                        {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
            let walk_stop = &stop;
            scope.spawn(move || self.want_all(&want, &give, walk_stop));
            while let Ok(found) = given.recv() {
                if !take(found) {
                    stop.store(true, Ordering::Relaxed);
                    break;
                }
            }
            drop(given);
        });
    }

    fn want_all(&self, want: &SyncSender<PageRunOf>, give: &SyncSender<Found>, stop: &AtomicBool) {
        let stopped = || StoreError::Ended {
            path: "reader".into(),
        };
        for memory in self.memory {
            let mut pages = 0;
            let walked = self.walk(memory, &mut |object, need| match need {
                _ if stop.load(Ordering::Relaxed) => Err(stopped()),
                Need::Node(_) => give
                    .send(Found::Node(object, Ok(())))
                    .map_err(|_| stopped()),
                Need::Pages(entry) => {
                    let run = PageRun {
                        object,
                        window: entry.window,
                        present: entry.present,
                    };
                    pages += u64::from(entry.present.count_ones());
                    want.send((run, entry.chunk)).map_err(|_| stopped())
                }
            });
            let checked = walked.and_then(|()| {
                if pages * self.page_size == memory.bytes {
                    Ok(())
                } else {
                    Err(StoreError::Damaged {
                        path: "page index".into(),
                        what: format!(
                            "it has {} bytes of pages, the manifest says {}",
                            pages * self.page_size,
                            memory.bytes
                        ),
                    })
                }
            });
            if let Err(error) = checked
                && give.send(Found::Node(memory.object, Err(error))).is_err()
            {
                return;
            }
        }
    }

    fn walk(
        &self,
        memory: &MemoryEntry,
        visit: &mut dyn FnMut(ObjectId, Need) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Some(root) = memory.root else {
            return Ok(());
        };
        let visit = std::cell::RefCell::new(visit);
        let result = walk_all(
            root,
            &mut |id| self.source.chunk(id),
            &mut |id| (visit.borrow_mut())(memory.object, Need::Node(id)),
            &mut |entry| (visit.borrow_mut())(memory.object, Need::Pages(entry)),
        );
        result.map_err(|error| match error {
            WalkError::Other(error) => error,
            WalkError::Damaged(node) => StoreError::BadChunk {
                chunk: node.node,
                what: format!("as a node of the page index: {}", node.what),
            },
        })
    }

    fn pages(&self, run: &PageRun, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let fits = run.present != 0
            && u64::from(run.present) >> window_pages(self.page_size) == 0
            && run.window <= u64::MAX / WINDOW_BYTES;
        let bytes = self.source.chunk(id)?;
        if !fits || bytes.len() as u64 != run.bytes(self.page_size) {
            return Err(StoreError::BadRun {
                object: run.object,
                window: run.window,
                what: "the chunk does not have the pages that the index says",
            });
        }
        Ok(bytes)
    }
}

type PageRunOf = (PageRun, ChunkId);

enum Found {
    Pages(PageRun, Result<Vec<u8>, StoreError>),
    Node(ObjectId, Result<(), StoreError>),
}

enum Need {
    Node(ChunkId),
    Pages(Entry),
}

fn next<T>(queue: &Mutex<Receiver<T>>) -> Option<T> {
    locked(queue).recv().ok()
}

fn window_text(window: Option<u64>) -> String {
    window.map_or_else(
        || " page index".to_owned(),
        |window| format!(" address {:#x}", window.saturating_mul(WINDOW_BYTES)),
    )
}
