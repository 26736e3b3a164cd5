//! Capture of a tree: look for obstacles, hold, take the state, let go, hand out the pages.
//!
//! Each step is a value that the next one consumes. Dropping any of them lets the tree run on as if
//! nothing had happened.

mod hold;
mod preflight;
mod take;

use std::time::{Duration, Instant};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ManifestBody, MemoryEntry, PageRun};
use crcoord_common::wire::control::CaptureSummary;
use crcoord_kernel::memory;
use crcoord_kernel::net::lock::NetworkLock;
use crcoord_kernel::net::tcp_repair::{Repair, kick};
use crcoord_kernel::ptrace::{Stop, Tracee};
use crcoord_kernel::sys;

use crate::error::{Result, failure, obstacle};
use crate::pages::{PageRange, PageSink, stream};
use crate::tree::HeldTree;

pub use hold::Held;
pub use preflight::preflight;

/// A copy-on-write copy of a process; ends with the value.
#[derive(Debug)]
struct Snapshot(Option<Tracee>);

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Some(copy) = self.0.take() {
            end(&copy);
        }
    }
}

/// Kills a tracee and waits until it is gone.
fn end(tracee: &Tracee) {
    if sys::kill(tracee.tid(), SIGKILL).is_err() {
        return;
    }
    while let Ok(stop) = tracee.wait() {
        if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
            return;
        }
    }
}

const SIGKILL: i32 = 9;

/// Where pages of one address space are read from.
#[derive(Debug)]
struct PageSource {
    object: ObjectId,
    pid: i32,
    ranges: Vec<PageRange>,
    snapshot: Option<Snapshot>,
}

/// A tree whose state is taken and which still stands still.
#[derive(Debug)]
pub struct Captured {
    tree: HeldTree,
    lock: Option<NetworkLock>,
    body: ManifestBody,
    sources: Vec<PageSource>,
    copied: Vec<(PageRun, Vec<u8>)>,
    sockets: Vec<std::os::fd::OwnedFd>,
    ends: bool,
    summary: CaptureSummary,
}

impl Captured {
    /// What was taken.
    pub fn summary(&self) -> &CaptureSummary {
        &self.summary
    }

    /// Lets the tree run and its network flow, unless it is to end; gives how long it stood still.
    pub fn release(self) -> (Streaming, Duration) {
        let since = self.tree.since;
        let Captured {
            tree,
            lock,
            body,
            sources,
            copied,
            sockets,
            ends,
            ..
        } = self;
        let mut streaming = Streaming {
            body,
            sources,
            copied,
            ends: None,
        };
        if ends {
            streaming.ends = Some(Ending {
                tree,
                sockets,
                _lock: lock,
            });
            return (streaming, since.elapsed());
        }
        // A lock that cannot be lifted by a message ends with its socket. What is left of it is freed
        // last: that waits for the kernel.
        let _lifted = lock.map(NetworkLock::unlock);
        for socket in &sockets {
            // Wakes a sender that would else wait for its retransmission timer, while the program
            // stands still: calls on a socket under repair fail. Nothing is lost when a connection
            // has ended meanwhile.
            let _ = kick(socket);
        }
        tree.release();
        let frozen = since.elapsed();
        (streaming, frozen)
    }
}

/// A tree that is about to end: held, silent, and locked until it is gone.
#[derive(Debug)]
struct Ending {
    tree: HeldTree,
    sockets: Vec<std::os::fd::OwnedFd>,
    _lock: Option<NetworkLock>,
}

impl Ending {
    fn end(mut self) -> Result<()> {
        // Under repair a socket is closed without a word to its peer (invariant: no FIN or RST
        // escapes). The duplicates here stay open until the processes are gone. All or none: a job
        // that runs on has no socket under repair.
        let repairs = self
            .sockets
            .iter()
            .map(|socket| Repair::begin(std::os::fd::AsFd::as_fd(socket)))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| obstacle("engine-tcp", error.to_string()))?;
        repairs.into_iter().for_each(Repair::keep);
        // All are killed before any is waited for: a child's end must not wake its parent.
        for process in &self.tree.processes {
            if !process.threads.is_empty() {
                sys::kill(process.pid, SIGKILL)
                    .map_err(|error| failure("ending a process", &error).pid(process.pid))?;
            }
        }
        for process in self.tree.processes.drain(..) {
            // The main thread reports last, once all others are gone.
            for thread in process.threads.iter().rev() {
                while let Ok(stop) = thread.wait() {
                    if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Pages on their way out.
#[derive(Debug)]
pub struct Streaming {
    body: ManifestBody,
    sources: Vec<PageSource>,
    copied: Vec<(PageRun, Vec<u8>)>,
    ends: Option<Ending>,
}

impl Streaming {
    /// Hands all pages to `sink` and then gives the manifest's body, whose page index roots are
    /// still to be filled in.
    pub fn stream(&mut self, sink: &mut dyn PageSink) -> Result<ManifestBody> {
        let mut bytes = std::collections::BTreeMap::<ObjectId, u64>::new();
        for (run, content) in self.copied.drain(..) {
            sink.put(run, &content)?;
            *bytes.entry(run.object).or_default() += content.len() as u64;
        }
        for source in self.sources.drain(..) {
            let pid = source.pid;
            let mut read = |pieces: &[memory::Piece], buffer: &mut [u8]| {
                memory::read_pieces_forced(pid, pieces, buffer)
            };
            *bytes.entry(source.object).or_default() +=
                stream(source.object, &source.ranges, &mut read, sink)?;
            drop(source.snapshot);
        }
        self.body.memory = bytes
            .into_iter()
            .map(|(object, bytes)| MemoryEntry {
                object,
                root: None,
                bytes,
            })
            .collect();
        Ok(self.body.clone())
    }

    /// The image is safe: a tree that was to end is ended now. Without this call it runs on.
    pub fn end(self) -> Result<()> {
        self.ends.map_or(Ok(()), Ending::end)
    }
}

/// Seconds since 1970-01-01 UTC.
fn unix_time() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Microseconds since an instant.
pub fn microseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
