//! The image's records, decoded, and checked for what would make building them unsafe.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::record::RecordError;
use crcoord_common::image::{ImageRecord, PageRun, Record, WINDOW_BYTES};
use crcoord_common::wire::engine::RestoreTarget;
use crcoord_kernel::proc::vm_flags;
use crcoord_kernel::sys::page_size;

use crate::error::{Result, bad_image, failure, obstacle};
use crate::resources::descriptors::DescriptorTable;
use crate::resources::files::open_as_owner;
use crate::resources::mappings::{AddressSpaceImage, Backing, MappedFileImage, hash_file};
use crate::resources::process::ProcessImage;
use crate::resources::shared_memory::SharedMemoryImage;
use crate::resources::signals::SignalsImage;
use crate::resources::threads::ThreadsImage;
use crate::resources::timers::IntervalTimersImage;
use crate::resources::{DESCRIPTORS, RestoreContext};

/// First address that no user mapping may reach (x86-64, 47 bits).
const ADDRESS_LIMIT: u64 = 0x7fff_ffff_f000;
/// Lowest address that is used for the builder's area (vm.mmap_min_addr is at most 64 KiB).
const LOWEST: u64 = 1 << 16;
/// Largest pid (PID_MAX_LIMIT).
const PID_LIMIT: i32 = 1 << 22;

/// A decoded image. Everything is by pid inside the job.
#[derive(Debug, Default)]
pub struct Image {
    /// Processes.
    pub processes: BTreeMap<i32, ProcessImage>,
    /// Processes without a parent in the tree.
    pub roots: Vec<i32>,
    /// Threads.
    pub threads: BTreeMap<i32, ThreadsImage>,
    /// Signals.
    pub signals: BTreeMap<i32, SignalsImage>,
    /// Interval timers.
    pub timers: BTreeMap<i32, IntervalTimersImage>,
    /// Address spaces.
    pub spaces: BTreeMap<i32, AddressSpaceImage>,
    /// Descriptor tables.
    pub tables: BTreeMap<i32, DescriptorTable>,
    files: Vec<MappedFileImage>,
    shared: Vec<SharedMemoryImage>,
    records: Vec<Record>,
}

impl Image {
    /// Decodes all records; unknown kinds are refused by name.
    pub fn decode(target: &RestoreTarget) -> Result<Image> {
        let mut image = Image::default();
        let mut unknown = Vec::new();
        for record in &target.body.records {
            if !image.take(record)? {
                unknown.push(record);
            }
        }
        let known: BTreeSet<&str> = DESCRIPTORS.iter().map(|kind| kind.name).collect();
        for record in unknown {
            if !known.contains(record.kind.as_str()) {
                return Err(RecordError::TooNew {
                    kind: record.kind.clone(),
                    min_reader: record.min_reader,
                    known: 0,
                }
                .into());
            }
            image.records.push(record.clone());
        }
        image.check(target)?;
        Ok(image)
    }

    fn take(&mut self, record: &Record) -> Result<bool> {
        fn insert<T: ImageRecord>(
            record: &Record,
            into: &mut BTreeMap<i32, T>,
            pid: impl Fn(&T) -> i32,
        ) -> Result<bool> {
            if !record.is::<T>() {
                return Ok(false);
            }
            let state: T = record.decode()?;
            let pid = pid(&state);
            if into.insert(pid, state).is_some() {
                return Err(bad_image(format!("two {} records of one process", T::KIND))
                    .pid(pid)
                    .into());
            }
            Ok(true)
        }
        if record.is::<MappedFileImage>() {
            self.files.push(record.decode()?);
            return Ok(true);
        }
        if record.is::<SharedMemoryImage>() {
            self.shared.push(record.decode()?);
            return Ok(true);
        }
        Ok(insert(record, &mut self.processes, |image: &ProcessImage| {
            image.pid
        })? || insert(record, &mut self.threads, |image: &ThreadsImage| image.pid)?
            || insert(record, &mut self.signals, |image: &SignalsImage| image.pid)?
            || insert(record, &mut self.timers, |image: &IntervalTimersImage| {
                image.pid
            })?
            || insert(record, &mut self.spaces, |image: &AddressSpaceImage| {
                image.pid
            })?
            || insert(record, &mut self.tables, |image: &DescriptorTable| {
                image.pid
            })?)
    }

    fn check(&mut self, target: &RestoreTarget) -> Result<()> {
        let mut ids = BTreeSet::new();
        for (pid, process) in &self.processes {
            let bad = |what: &str| bad_image(format!("process {pid} {what}"));
            if *pid <= 0 || *pid > PID_LIMIT || !ids.insert(*pid) {
                return Err(bad("has an impossible or repeated id").into());
            }
            if process.parent != 0 && !self.processes.contains_key(&process.parent) {
                return Err(bad("has a parent that is not in the image").into());
            }
            if process.parent == 0 {
                self.roots.push(*pid);
            }
            if process.zombie.is_some() {
                if self.spaces.contains_key(pid) || self.threads.contains_key(pid) {
                    return Err(bad("is dead but has memory or threads").into());
                }
                continue;
            }
            let Some(threads) = self.threads.get(pid) else {
                return Err(bad("has no threads").into());
            };
            if threads
                .threads
                .first()
                .is_none_or(|thread| thread.tid != *pid)
            {
                return Err(bad("has no main thread").into());
            }
            for thread in &threads.threads {
                thread
                    .credentials
                    .check_bounds(target.owner.as_ref(), *pid)?;
                let repeated = thread.tid != *pid && !ids.insert(thread.tid);
                if thread.tid <= 0 || thread.tid > PID_LIMIT || repeated {
                    return Err(bad("has a thread with an impossible or repeated id").into());
                }
            }
            match self.spaces.get(pid) {
                Some(space) => check_space(space)?,
                None => return Err(bad("has no memory").into()),
            }
        }
        if self.roots.is_empty() {
            return Err(bad_image("it holds no process").into());
        }
        self.check_acyclic()
    }

    fn check_acyclic(&self) -> Result<()> {
        for start in self.processes.keys() {
            let mut at = *start;
            for _ in 0..=self.processes.len() {
                match self.processes.get(&at) {
                    Some(process) if process.parent != 0 => at = process.parent,
                    _ => break,
                }
            }
            if self
                .processes
                .get(&at)
                .is_some_and(|process| process.parent != 0)
            {
                return Err(bad_image(format!("process {start} is its own ancestor")).into());
            }
        }
        Ok(())
    }

    /// Processes that are not zombies.
    pub fn living(&self) -> impl Iterator<Item = &ProcessImage> {
        self.processes
            .values()
            .filter(|process| process.zombie.is_none())
    }

    /// Children of a process (or the roots, of 0), ascending.
    pub fn children(&self, parent: i32) -> impl Iterator<Item = &ProcessImage> {
        self.processes
            .values()
            .filter(move |process| process.parent == parent)
    }

    /// Records of one kind of descriptor.
    pub fn of_kind(&self, kind: &str) -> Vec<&Record> {
        self.records
            .iter()
            .filter(|record| record.kind == kind)
            .collect()
    }

    /// The process whose private memory has this id.
    pub fn owner_of(&self, object: ObjectId) -> Option<i32> {
        self.spaces
            .values()
            .find(|space| space.object == object)
            .map(|space| space.pid)
    }

    /// True when every page of a run lies in private memory of its process, or inside its shared
    /// object: an image must not reach the builder's code or the kernel's mappings.
    pub fn may_fill(&self, run: &PageRun) -> bool {
        let page = page_size();
        let Some(start) = run.window.checked_mul(WINDOW_BYTES) else {
            return false;
        };
        if start.checked_add(WINDOW_BYTES).is_none() {
            return false;
        }
        if let Some(shared) = self
            .shared
            .iter()
            .find(|shared| shared.object == run.object)
        {
            let end = shared.size.next_multiple_of(page);
            return run
                .pieces(page)
                .all(|(at, _, length)| at + length as u64 <= end);
        }
        let Some(space) = self
            .spaces
            .values()
            .find(|space| space.object == run.object)
        else {
            return false;
        };
        run.pieces(page).all(|(at, _, length)| {
            let end = at + length as u64;
            let mut at = at;
            // Neighbouring mappings may share a piece.
            while at < end {
                let next = space.mappings.partition_point(|mapping| mapping.end <= at);
                match space.mappings.get(next) {
                    Some(mapping)
                        if mapping.start <= at
                            && !matches!(mapping.backing, Backing::Kernel(_))
                            && !mapping.has(vm_flags::SHARED) =>
                    {
                        at = mapping.end;
                    }
                    _ => return false,
                }
            }
            true
        })
    }

    /// The lowest descriptor number above all of the image.
    pub fn descriptor_base(&self) -> Result<i32> {
        const LIMIT: i32 = 1 << 20;
        let highest = self
            .tables
            .values()
            .flat_map(|table| &table.entries)
            .map(|entry| entry.fd)
            .max()
            .unwrap_or(0);
        if highest >= LIMIT {
            return Err(bad_image(format!("descriptor {highest} is out of range")).into());
        }
        Ok(highest.max(63) + 1)
    }

    /// An address that is free in all processes of the image and in this one.
    pub fn free_address(&self, bytes: u64) -> Result<u64> {
        let own = crcoord_kernel::proc::mappings(std::process::id() as i32)
            .map_err(|error| failure("reading own mappings", &error))?;
        let mut used: Vec<(u64, u64)> = own.iter().map(|own| (own.start, own.end)).collect();
        for space in self.spaces.values() {
            used.extend(
                space
                    .mappings
                    .iter()
                    .map(|mapping| (mapping.start, mapping.end)),
            );
        }
        used.sort_unstable();
        let mut at = LOWEST;
        for (start, end) in used {
            if start >= at && start - at >= bytes {
                break;
            }
            at = at.max(end);
        }
        if at + bytes > ADDRESS_LIMIT {
            return Err(obstacle("engine-no-address", "no address is free for building").into());
        }
        Ok(at)
    }

    /// Opens mapped files and makes shared memory anew.
    pub fn open_memory(
        &self,
        context: &mut RestoreContext<'_>,
    ) -> Result<BTreeMap<ObjectId, File>> {
        const O_RDWR: u32 = 2;
        for file in &self.files {
            let flags = if file.writable { O_RDWR } else { 0 };
            let mut opened = open_as_owner(context, &file.path, flags)?;
            verify(file, &mut opened)?;
            context.keep(file.object, opened.into())?;
        }
        let mut shared = BTreeMap::new();
        for image in &self.shared {
            shared.insert(image.object, image.open(context)?);
        }
        Ok(shared)
    }
}

/// A file whose unchanged pages are needed must be the same file.
fn verify(image: &MappedFileImage, file: &mut File) -> Result<()> {
    let Some(expected) = image.content else {
        return Ok(());
    };
    let found = hash_file(file)
        .map_err(|error| failure("reading a mapped file", &error).path(&image.path))?;
    if found != expected {
        return Err(obstacle(
            "engine-mapped-file-changed",
            "a program or library is not the same as at the checkpoint",
        )
        .path(&image.path)
        .remedy("install the same version on this node")
        .into());
    }
    Ok(())
}

fn check_space(space: &AddressSpaceImage) -> Result<()> {
    let page = page_size();
    let mut last = 0;
    for mapping in &space.mappings {
        let bad = |what: &str| {
            bad_image(format!("a mapping {what}"))
                .pid(space.pid)
                .address(format!("{:#x}-{:#x}", mapping.start, mapping.end))
        };
        let aligned = mapping.start % page == 0 && mapping.end % page == 0;
        if !aligned || mapping.start >= mapping.end {
            return Err(bad("is empty or not aligned").into());
        }
        if mapping.end > ADDRESS_LIMIT || mapping.start < last {
            return Err(bad("overlaps another or lies outside").into());
        }
        if mapping.backing == Backing::Anonymous && mapping.has(vm_flags::SHARED) {
            return Err(bad("is shared without an object").into());
        }
        last = mapping.end;
    }
    Ok(())
}
