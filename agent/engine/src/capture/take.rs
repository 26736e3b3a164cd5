//! Taking the state of a held tree.

use std::collections::{BTreeMap, BTreeSet};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ManifestBody, ObjectEntry, ObjectKind, PageRun, Record, WINDOW_BYTES};
use crcoord_common::report::Report;
use crcoord_common::wire::control::CaptureSummary;
use crcoord_kernel::inject::{InjectError, Injection, Original, signal_bit};
use crcoord_kernel::memory;
use crcoord_kernel::proc::{self, Stat, Status};
use crcoord_kernel::sys::{self, CpuSet};

use super::{Captured, Held, PageSource, Snapshot, unix_time};
use crate::EngineError;
use crate::error::{Result, failure};
use crate::pages::{PageRange, PageSink, stream};
use crate::resources::descriptors::{self, by_kind, object_entry};
use crate::resources::mappings::{self, MappedObjects, present_ranges};
use crate::resources::process;
use crate::resources::process::{Family, ProcessImage};
use crate::resources::signals::SignalsImage;
use crate::resources::threads::{ThreadImage, ThreadsImage};
use crate::resources::timers::IntervalTimersImage;
use crate::tree::HeldProcess;

/// Less private memory than this is copied at once: a copy-on-write copy of the process would take
/// longer.
const COPY_LIMIT: u64 = 1 << 20;
const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;

impl Held {
    /// Takes everything. With `ends` the tree is going to end after its pages are read; else it will
    /// run on while copies of it are read. An error lets the tree run on.
    pub fn capture(self, ends: bool) -> Result<Captured> {
        let affinity = CpuSet::current().ok();
        let captured = self.capture_pinned(ends);
        if let Some(affinity) = affinity {
            let _ = affinity.apply();
        }
        captured
    }

    fn capture_pinned(self, ends: bool) -> Result<Captured> {
        let Held {
            target,
            tree,
            lock,
            hashes,
        } = self;
        let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
        let obstacles = recheck(&pids)?;
        if !obstacles.is_empty() {
            return Err(EngineError(obstacles));
        }
        let descriptions = descriptors::scan(&pids, 1)?;
        let mut context = super::preflight::context(&target, &pids, &descriptions);
        let family = Family::new(&context.inner);
        let mut taking = Taking {
            ends,
            family: &family,
            inner: &context.inner,
            objects: MappedObjects {
                hashes,
                next: descriptions.len() as u32 + 1,
                ..MappedObjects::default()
            },
            records: Vec::new(),
            entries: Vec::new(),
            sources: Vec::new(),
            copied: Copies::default(),
            threads: 0,
            subreapers: false,
        };
        for process in &tree.processes {
            taking.process(process)?;
        }
        for shared in taking.objects.shared.values() {
            taking.records.push(Record::encode(&shared.image));
            taking.entries.push(memory_entry(
                shared.image.object,
                ObjectKind::SharedMemory,
                None,
            ));
            shared.stream(&mut taking.copied)?;
        }
        for file in taking.objects.files.values() {
            taking.records.push(Record::encode(file));
        }
        let Taking {
            mut records,
            mut entries,
            sources,
            copied,
            threads,
            ..
        } = taking;
        records.extend(descriptors::tables(&context).iter().map(Record::encode));
        let (sorted, obstacles) = by_kind(&context);
        if !obstacles.is_empty() {
            return Err(EngineError(obstacles));
        }
        for (kind, descriptions) in sorted {
            entries.extend(
                descriptions
                    .iter()
                    .map(|description| object_entry(&context, kind, description)),
            );
            records.extend((kind.capture)(&mut context, &descriptions)?);
        }
        let pending: u64 = sources
            .iter()
            .flat_map(|source| &source.ranges)
            .map(|range| range.end - range.start)
            .sum();
        let summary = CaptureSummary {
            processes: tree.processes.len() as u32,
            threads,
            memory_bytes: pending + copied.bytes,
            copied_bytes: copied.bytes,
            connections: context.connections,
        };
        let body = ManifestBody {
            objects: entries,
            part: None,
            node: None,
            taken: unix_time(),
            kernel: sys::kernel_release(),
            records,
            memory: Vec::new(),
        };
        let sockets = context.sockets;
        Ok(Captured {
            tree,
            lock,
            body,
            sources,
            copied: copied.runs,
            sockets,
            ends,
            summary,
        })
    }
}

/// What could have appeared between the preflight and the hold.
fn recheck(pids: &[i32]) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for &pid in pids {
        reports.extend(
            process::check(pids, pid).map_err(|error| failure("checking", &error).pid(pid))?,
        );
    }
    Ok(reports)
}

fn memory_entry(id: ObjectId, kind: ObjectKind, holder: Option<i32>) -> ObjectEntry {
    ObjectEntry {
        id,
        kind,
        path: String::new(),
        flags: 0,
        owner: None,
        mode: None,
        descriptors: holder.map(|pid| (pid, -1)).into_iter().collect(),
    }
}

/// Pages that were copied while the tree stood still.
#[derive(Debug, Default)]
struct Copies {
    runs: Vec<(PageRun, Vec<u8>)>,
    bytes: u64,
}

impl PageSink for Copies {
    fn put(&mut self, run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
        self.bytes += bytes.len() as u64;
        self.runs.push((run, bytes.to_vec()));
        Ok(())
    }
}

struct Taking<'a> {
    ends: bool,
    family: &'a Family,
    inner: &'a BTreeMap<i32, i32>,
    objects: MappedObjects,
    records: Vec<Record>,
    entries: Vec<ObjectEntry>,
    sources: Vec<PageSource>,
    copied: Copies,
    threads: u32,
    /// A process of the tree so far is a subreaper.
    subreapers: bool,
}

impl Taking<'_> {
    fn process(&mut self, process: &HeldProcess) -> Result<()> {
        let pid = process.pid;
        let failed = |what: &'static str| {
            move |error: std::io::Error| -> Report { failure(what, &error).pid(pid) }
        };
        let Some(main) = process.threads.first() else {
            self.records
                .push(Record::encode(&ProcessImage::zombie(pid, self.family)?));
            return Ok(());
        };
        if main.tid() != pid {
            return Err(crate::tree::main_thread_ended(pid).into());
        }
        let inner = self.inner.get(&pid).copied().unwrap_or(pid);
        let status = Status::read(pid).map_err(failed("reading status"))?;
        // From before the injection, which is not part of the program.
        let mappings = proc::mappings(pid).map_err(failed("reading mappings"))?;
        let waiting = main
            .pending_signals(true)
            .map_err(failed("reading pending signals"))?;
        let waiting = waiting.iter().fold(0, |all, info| all | signal_bit(info));
        let originals = process
            .threads
            .iter()
            .map(|thread| Original::read(thread, pid, waiting))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        if let Ok(stat) = Stat::read(pid) {
            // Calls are much faster on the tracee's CPU; a CPU we may not use is no reason to fail.
            let _ = sys::pin_to_cpu(stat.cpu.max(0) as usize);
        }
        let mut injection = Injection::begin(main, pid, &originals[0], &mappings)?;
        let image = ProcessImage::capture(pid, self.family, &mut injection)?;
        self.subreapers |= image.subreaper;
        self.records.push(Record::encode(&image));
        let mut threads = Vec::with_capacity(originals.len());
        for (index, (thread, original)) in process.threads.iter().zip(&originals).enumerate() {
            threads.push(ThreadImage::capture(
                pid,
                thread,
                original,
                &mut injection,
                index == 0,
            )?);
        }
        self.threads += threads.len() as u32;
        self.records.push(Record::encode(&ThreadsImage {
            pid: inner,
            threads,
        }));
        self.records.push(Record::encode(&SignalsImage::capture(
            pid,
            inner,
            main,
            &status,
            &mut injection,
        )?));
        if let Some(timers) = IntervalTimersImage::capture(inner, &mut injection)? {
            self.records.push(Record::encode(&timers));
        }
        let object = self.objects.allocate();
        self.entries
            .push(memory_entry(object, ObjectKind::PrivateMemory, Some(inner)));
        let (image, pages) = mappings::capture(
            pid,
            inner,
            object,
            &mappings,
            &mut self.objects,
            &mut injection,
        )?;
        self.records.push(Record::encode(&image));
        let only_here = present_ranges(pid, &pages.only_in_original)?;
        let ranges = present_ranges(pid, &pages.copied_on_write)?;
        if self.ends {
            injection.end()?;
            let mut ranges = [only_here, ranges].concat();
            ranges.sort_by_key(|range| range.start);
            self.sources.push(PageSource {
                object,
                pid,
                ranges,
                snapshot: None,
            });
            return Ok(());
        }
        let (ranges, together) = apart_from(&only_here, ranges);
        self.copy(pid, object, &together)?;
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        // The copy is a child of the nearest subreaper, which must not be a program of the tree.
        if bytes <= COPY_LIMIT || self.subreapers {
            injection.end()?;
            return self.copy(pid, object, &ranges);
        }
        let copy = match injection.snapshot() {
            Ok(copy) => copy,
            // No process or memory to be had (RLIMIT_NPROC, pids.max, strict overcommit).
            Err(InjectError::Call { error, .. })
                if matches!(error.raw_os_error(), Some(EAGAIN | ENOMEM)) =>
            {
                injection.end()?;
                return self.copy(pid, object, &ranges);
            }
            Err(error) => return Err(error.into()),
        };
        // What the copy keeps alive is charged to the job: out of memory, the copy goes first.
        std::fs::write(format!("/proc/{}/oom_score_adj", copy.tid()), "1000")
            .map_err(failed("setting oom_score_adj"))?;
        let (pid, snapshot) = (copy.tid(), Some(Snapshot(Some(copy))));
        injection.end()?;
        self.sources.push(PageSource {
            object,
            pid,
            ranges,
            snapshot,
        });
        Ok(())
    }

    fn copy(&mut self, pid: i32, object: ObjectId, ranges: &[PageRange]) -> Result<()> {
        let mut read = |pieces: &[memory::Piece], buffer: &mut [u8]| {
            memory::read_pieces_forced(pid, pieces, buffer)
        };
        stream(object, ranges, &mut read, &mut self.copied)?;
        Ok(())
    }
}

/// Splits `ranges` into those in windows without a page of `special`, and all others together with
/// `special`: a window is one run and must be read in one place.
fn apart_from(special: &[PageRange], ranges: Vec<PageRange>) -> (Vec<PageRange>, Vec<PageRange>) {
    if special.is_empty() {
        return (ranges, Vec::new());
    }
    let windows: BTreeSet<u64> = special
        .iter()
        .flat_map(|range| range.start / WINDOW_BYTES..=(range.end - 1) / WINDOW_BYTES)
        .collect();
    let (mut apart, mut together) = (Vec::new(), special.to_vec());
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / WINDOW_BYTES + 1) * WINDOW_BYTES);
            let piece = PageRange {
                start: at,
                end,
                ..range
            };
            if windows.contains(&(at / WINDOW_BYTES)) {
                together.push(piece);
            } else {
                apart.push(piece);
            }
            at = end;
        }
    }
    together.sort_by_key(|range| range.start);
    (apart, together)
}
