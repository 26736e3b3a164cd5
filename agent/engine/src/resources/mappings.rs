//! Address spaces: every mapping with its protection and advice, what backs it, where the kernel
//! thinks code, data, heap, arguments and environment are, and the vdso.

use std::collections::BTreeMap;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ChunkId, ImageRecord};
use crcoord_common::report::Report;
use crcoord_kernel::arch;
use crcoord_kernel::inject::Injection;
use crcoord_kernel::memory;
use crcoord_kernel::number::SYS_BRK;
use crcoord_kernel::pagemap::{PageMap, Wanted};
use crcoord_kernel::proc::{Mapping, Stat, vm_flags};
use serde::{Deserialize, Serialize};

use super::files::DELETED;
use crate::error::{Result, failure, obstacle};
use crate::pages::PageRange;

/// An address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressSpaceImage {
    /// Pid inside the job.
    pub pid: i32,
    /// Its private pages are addressed by virtual address under this id.
    pub object: ObjectId,
    /// Mappings, ascending.
    pub mappings: Vec<MappingImage>,
    /// `struct prctl_mm_map` without auxv and exe: start_code, end_code, start_data, end_data,
    /// start_brk, brk, start_stack, arg_start, arg_end, env_start, env_end.
    pub bounds: [u64; 11],
    /// Auxiliary vector.
    #[serde(with = "serde_bytes")]
    pub auxiliary_vector: Vec<u8>,
    /// The program's file.
    pub program: ObjectId,
    /// Hash of the vdso's code.
    pub vdso: ChunkId,
}

impl ImageRecord for AddressSpaceImage {
    const KIND: &'static str = "address-space";
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingImage {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// [`vm_flags`].
    pub flags: u32,
    /// What is behind it.
    pub backing: Backing,
}

impl MappingImage {
    /// True when all these flags are set.
    pub fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Nothing: private anonymous memory.
    Anonymous,
    /// An object and an offset in it: a file, or shared memory.
    Object(ObjectId, u64),
    /// The kernel's vdso (0), vvar (1) or vvar_vclock (2).
    Kernel(u8),
}

/// Names of the kernel's own mappings, by the number in [`Backing::Kernel`].
pub const KERNEL_MAPPINGS: [&str; 3] = ["[vdso]", "[vvar]", "[vvar_vclock]"];

/// A file that is mapped or executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFileImage {
    /// Object id.
    pub object: ObjectId,
    /// Path in the member's mount namespace.
    pub path: String,
    /// Mapped shared and open for writing.
    pub writable: bool,
    /// Size in bytes at the cut.
    pub size: u64,
    /// Hash of the content, where pages of it are needed unchanged at restart.
    pub content: Option<ChunkId>,
}

impl ImageRecord for MappedFileImage {
    const KIND: &'static str = "mapped-file";
}

/// Hashes of files that are mapped privately, made before the freeze, by path, size and mtime.
#[derive(Debug, Default)]
pub struct ContentHashes(BTreeMap<(String, u64, i64, i64), ChunkId>);

impl ContentHashes {
    /// The hash of a file as process `pid` sees it; read once as long as size and time stay.
    pub fn of(&mut self, pid: i32, path: &str) -> std::io::Result<(u64, ChunkId)> {
        use std::os::unix::fs::MetadataExt;
        let seen = format!("/proc/{pid}/root{path}");
        let metadata = std::fs::metadata(&seen)?;
        if !metadata.is_file() {
            // A device has no end.
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let key = (
            path.to_owned(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
        );
        if let Some(hash) = self.0.get(&key) {
            return Ok((metadata.len(), *hash));
        }
        let hash = hash_file(&mut std::fs::File::open(&seen)?)?;
        self.0.insert(key, hash);
        Ok((metadata.len(), hash))
    }
}

/// BLAKE3 of a file's content.
pub fn hash_file(file: &mut std::fs::File) -> std::io::Result<ChunkId> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(ChunkId(*hasher.finalize().as_bytes()))
}

/// Reasons why mappings cannot be captured; the process may run.
pub fn check(pid: i32, mappings: &[Mapping]) -> Vec<Report> {
    mappings
        .iter()
        .filter_map(|mapping| refuse(mapping).map(|report| report.pid(pid)))
        .collect()
}

fn refuse(mapping: &Mapping) -> Option<Report> {
    let name = mapping.name.as_str();
    if KERNEL_MAPPINGS.contains(&name) || name == "[vsyscall]" {
        return None;
    }
    let (code, message, remedy) = if mapping.has(vm_flags::USERFAULT) {
        (
            "engine-userfaultfd",
            "memory watched by userfaultfd",
            "switch the program's pager off",
        )
    } else if mapping.has(vm_flags::HUGETLB) {
        (
            "engine-hugetlb",
            "huge pages of hugetlbfs",
            "use transparent huge pages",
        )
    } else if mapping.has(vm_flags::SHADOW_STACK) {
        (
            "engine-shadow-stack",
            "a shadow stack",
            "run with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
    } else if mapping.flags & (vm_flags::PFN | vm_flags::IO) != 0 {
        (
            "engine-device-memory",
            "device memory",
            "close the device before the checkpoint",
        )
    } else if mapping.protection_key != 0 {
        (
            "engine-protection-key",
            "a memory protection key",
            "run without protection keys",
        )
    } else if name.starts_with("/[aio]") {
        (
            "engine-aio",
            "an AIO context",
            "use ordinary input and output",
        )
    } else if name.starts_with("/SYSV") {
        (
            "engine-sysv-shm",
            "System V shared memory",
            "use POSIX or anonymous shared memory",
        )
    } else if name.starts_with("/memfd:") {
        ("engine-memfd", "a memfd", "use anonymous shared memory")
    } else if name.starts_with("[uprobes]") {
        (
            "engine-uprobes",
            "a user-space probe",
            "end the tracing tool first",
        )
    } else if name.ends_with(DELETED) && !is_shared_anonymous(mapping) {
        (
            "engine-mapped-deleted",
            "a mapped file without a name",
            "keep mapped files linked",
        )
    } else {
        return None;
    };
    Some(
        obstacle(code, format!("{message} is not supported yet"))
            .address(format!("{:#x}", mapping.start))
            .path(name)
            .remedy(remedy),
    )
}

fn is_shared_anonymous(mapping: &Mapping) -> bool {
    mapping.has(vm_flags::SHARED) && matches!(mapping.name.as_str(), "/dev/zero (deleted)")
        || mapping.name.starts_with("[anon_shmem:")
}

/// What is to be read of one address space.
#[derive(Debug, Default)]
pub struct PrivatePages {
    /// Mappings whose private pages a copy-on-write copy has too, and whether only pages that
    /// replace a file's are wanted.
    pub copied_on_write: Vec<(u64, u64, bool)>,
    /// Mappings whose pages a copy would lack: read while held.
    pub only_in_original: Vec<(u64, u64, bool)>,
}

/// Objects behind mappings of the whole tree.
#[derive(Debug, Default)]
pub struct MappedObjects {
    /// Hashes made so far.
    pub hashes: ContentHashes,
    /// The next free object id.
    pub next: u32,
    /// Files by path and whether they are mapped shared for writing.
    pub files: BTreeMap<(String, bool), MappedFileImage>,
    /// Shared memory by device and inode.
    pub shared: BTreeMap<(u64, u64), super::shared_memory::SharedObject>,
}

impl MappedObjects {
    /// A new object id.
    pub fn allocate(&mut self) -> ObjectId {
        self.next += 1;
        ObjectId(self.next - 1)
    }
}

/// Reads a held process's address space. `mappings` are from before the injection.
pub fn capture(
    pid: i32,
    inner: i32,
    object: ObjectId,
    mappings: &[Mapping],
    objects: &mut MappedObjects,
    injection: &mut Injection<'_>,
) -> Result<(AddressSpaceImage, PrivatePages)> {
    let obstacles = check(pid, mappings);
    if !obstacles.is_empty() {
        return Err(crate::EngineError(obstacles));
    }
    let failed = |what: &'static str| {
        move |error: std::io::Error| -> Report { failure(what, &error).pid(pid) }
    };
    let mut images = Vec::with_capacity(mappings.len());
    let mut pages = PrivatePages::default();
    let mut vdso = None;
    for mapping in mappings
        .iter()
        .filter(|mapping| mapping.name != "[vsyscall]")
    {
        let kernel = KERNEL_MAPPINGS
            .iter()
            .position(|name| *name == mapping.name);
        let backing = if let Some(which) = kernel {
            if which == 0 {
                vdso = Some(hash_vdso(pid, mapping)?);
            }
            Backing::Kernel(which as u8)
        } else if is_shared_anonymous(mapping) {
            let key = (mapping.device, mapping.inode);
            if !objects.shared.contains_key(&key) {
                let shared = super::shared_memory::SharedObject::open(
                    objects.allocate(),
                    pid,
                    mapping.start,
                    mapping.end,
                )?;
                objects.shared.insert(key, shared);
            }
            Backing::Object(objects.shared[&key].image.object, mapping.offset)
        } else if mapping.inode != 0 {
            let writable = mapping.has(vm_flags::SHARED | vm_flags::MAY_WRITE);
            let shared = mapping.has(vm_flags::SHARED);
            let file = mapped_file(pid, &mapping.name, writable, shared, objects)?;
            Backing::Object(file, mapping.offset)
        } else {
            Backing::Anonymous
        };
        if kernel.is_none() && !mapping.has(vm_flags::SHARED) {
            let range = (mapping.start, mapping.end, mapping.inode != 0);
            if mapping.flags & (vm_flags::DONT_FORK | vm_flags::WIPE_ON_FORK) != 0 {
                pages.only_in_original.push(range);
            } else {
                pages.copied_on_write.push(range);
            }
        }
        images.push(MappingImage {
            start: mapping.start,
            end: mapping.end,
            flags: mapping.flags,
            backing,
        });
    }
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(failed("readlink exe"))?;
    let program = program.to_string_lossy().into_owned();
    if program.ends_with(DELETED) {
        return Err(obstacle(
            "engine-program-deleted",
            "its program's file was removed or replaced",
        )
        .pid(pid)
        .path(program)
        .remedy("keep the program's file until the job ends")
        .into());
    }
    let program = mapped_file(pid, &program, false, false, objects)?;
    let stat = Stat::read(pid).map_err(failed("reading stat"))?;
    let brk = injection.call(SYS_BRK, [0; 6])? as u64;
    let image = AddressSpaceImage {
        pid: inner,
        object,
        mappings: images,
        bounds: [
            stat.start_code,
            stat.end_code,
            stat.start_data,
            stat.end_data,
            stat.start_brk,
            brk,
            stat.start_stack,
            stat.arg_start,
            stat.arg_end,
            stat.env_start,
            stat.env_end,
        ],
        auxiliary_vector: std::fs::read(format!("/proc/{pid}/auxv"))
            .map_err(failed("reading auxv"))?,
        program,
        vdso: vdso.ok_or_else(|| {
            obstacle("engine-no-vdso", "the process has no vdso")
                .pid(pid)
                .remedy("boot without vdso=0")
        })?,
    };
    Ok((image, pages))
}

/// Registers a mapped file; `shared` mappings take their content from the file as it is at restart.
fn mapped_file(
    pid: i32,
    path: &str,
    writable: bool,
    shared: bool,
    objects: &mut MappedObjects,
) -> Result<ObjectId> {
    let at = |error: std::io::Error| -> Report {
        obstacle(
            "engine-mapped-file",
            format!("a mapped file cannot be read: {error}"),
        )
        .pid(pid)
        .path(path)
        .remedy("keep mapped files at their paths")
    };
    let metadata = std::fs::metadata(format!("/proc/{pid}/root{path}")).map_err(at)?;
    let key = (path.to_owned(), writable);
    if !objects.files.contains_key(&key) {
        let image = MappedFileImage {
            object: objects.allocate(),
            path: path.to_owned(),
            writable,
            size: metadata.len(),
            content: None,
        };
        objects.files.insert(key.clone(), image);
    }
    let hashed = !shared && metadata.is_file();
    let MappedObjects { files, hashes, .. } = objects;
    let image = files
        .get_mut(&key)
        .ok_or_else(|| at(std::io::ErrorKind::NotFound.into()))?;
    if hashed && image.content.is_none() {
        let (size, hash) = hashes.of(pid, path).map_err(at)?;
        (image.size, image.content) = (size, Some(hash));
    }
    Ok(image.object)
}

/// Hash of the vdso without the bytes that an injection borrows.
fn hash_vdso(pid: i32, mapping: &Mapping) -> Result<ChunkId> {
    let mut bytes = vec![0; mapping.length() as usize];
    memory::read(pid, mapping.start, &mut bytes)
        .map_err(|error| failure("reading the vdso", &error).pid(pid))?;
    Ok(vdso_hash(&mut bytes))
}

/// Hash of a vdso's bytes without those that an injection borrows.
pub fn vdso_hash(bytes: &mut [u8]) -> ChunkId {
    let at = arch::BOOTSTRAP_OFFSET as usize;
    if let Some(borrowed) = bytes.get_mut(at..at + 8) {
        borrowed.fill(0);
    }
    ChunkId::of(bytes)
}

/// The ranges of pages that hold data, of some mappings of a stopped process.
pub fn present_ranges(pid: i32, mappings: &[(u64, u64, bool)]) -> Result<Vec<PageRange>> {
    let failed = |error: std::io::Error| failure("reading the page table", &error).pid(pid);
    let map = PageMap::open(pid).map_err(failed)?;
    let mut ranges = Vec::new();
    for (start, end, from_file) in mappings {
        let wanted = if *from_file {
            Wanted::CopiedFromFile
        } else {
            Wanted::Anonymous
        };
        map.ranges(*start, *end, wanted, &mut |start, end| {
            ranges.push(PageRange {
                start,
                end,
                keep_zeros: *from_file,
            });
        })
        .map_err(failed)?;
    }
    Ok(ranges)
}
