//! One process's address space: everything of the builder's goes, the image's mappings come, the
//! kernel's own are moved to their places.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::PageRun;
use crcoord_kernel::memory;
use crcoord_kernel::number::{
    SYS_MADVISE, SYS_MLOCK2, SYS_MMAP, SYS_MREMAP, SYS_MUNMAP, SYS_PRCTL, SYS_RSEQ, flag,
};
use crcoord_kernel::proc::{self, Mapping, vm_flags};
use crcoord_kernel::stub::{AREA_BYTES, Area, Call, Stub};
use crcoord_kernel::sys::page_size;

use super::image::Image;
use crate::error::{Result, bad_image, failure, obstacle};
use crate::resources::mappings::{
    AddressSpaceImage, Backing, KERNEL_MAPPINGS, MappingImage, vdso_hash,
};

/// End of user addresses (x86-64, 47 bits).
const END: u64 = 0x7fff_ffff_f000;

/// Gives the stub the image's mappings, still empty.
pub fn restore(
    image: &Image,
    space: &AddressSpaceImage,
    stub: &Stub,
    area: &Area,
    opened: &BTreeMap<ObjectId, OwnedFd>,
) -> Result<()> {
    forget_rseq(stub)?;
    let own =
        proc::mappings(stub.tid()).map_err(|error| failure("reading a stub's mappings", &error))?;
    let kernel: Vec<&Mapping> = own
        .iter()
        .filter(|mapping| KERNEL_MAPPINGS.contains(&mapping.name.as_str()))
        .collect();
    check_kernel_mappings(space, &kernel, stub)?;
    unmap_own(stub, area, &kernel)?;
    move_kernel_mappings(image, space, &kernel, stub, area)?;
    // The kernel exchanges the program's file only while nothing of the old one is mapped, and the
    // image may map the builder's own.
    set_bounds(space, stub, opened)?;
    let mut calls = Vec::with_capacity(space.mappings.len());
    for mapping in &space.mappings {
        calls.extend(map(mapping, opened, space.pid)?);
        calls.extend(advise(mapping));
    }
    stub.run_all(&calls)?;
    Ok(())
}

/// The stub came from a process whose C library had registered rseq: the kernel would write there.
fn forget_rseq(stub: &Stub) -> Result<()> {
    let rseq = stub
        .tracee()
        .rseq()
        .map_err(|error| failure("reading rseq", &error))?;
    if rseq.address != 0 {
        const UNREGISTER: u64 = 1;
        stub.call(
            SYS_RSEQ,
            [
                rseq.address,
                rseq.size.into(),
                UNREGISTER,
                rseq.signature.into(),
            ],
        )?;
    }
    Ok(())
}

/// The image's vdso must be this kernel's: programs keep addresses of its functions.
fn check_kernel_mappings(space: &AddressSpaceImage, own: &[&Mapping], stub: &Stub) -> Result<()> {
    let differs = |what: &str| {
        obstacle(
            "engine-vdso",
            format!("{what} differs between the image's kernel and this one"),
        )
        .pid(space.pid)
        .remedy("restart on a node with the kernel the image was taken on")
    };
    for (which, name) in (0u8..).zip(KERNEL_MAPPINGS) {
        let wanted = space
            .mappings
            .iter()
            .find(|m| m.backing == Backing::Kernel(which));
        let found = own.iter().find(|mapping| mapping.name == name);
        match (wanted, found) {
            (Some(wanted), Some(found)) if wanted.end - wanted.start == found.length() => {}
            (None, None) => {}
            _ => return Err(differs(name).into()),
        }
        if let (0, Some(vdso)) = (which, found) {
            let mut bytes = vec![0; vdso.length() as usize];
            memory::read(stub.tid(), vdso.start, &mut bytes)
                .map_err(|error| failure("reading the vdso", &error))?;
            if vdso_hash(&mut bytes) != space.vdso {
                return Err(differs("the vdso's code").into());
            }
        }
    }
    Ok(())
}

fn unmap_own(stub: &Stub, area: &Area, kernel: &[&Mapping]) -> Result<()> {
    let mut kept: Vec<(u64, u64)> = kernel
        .iter()
        .map(|mapping| (mapping.start, mapping.end))
        .collect();
    kept.push((area.address(), area.address() + AREA_BYTES));
    kept.sort_unstable();
    let mut calls = Vec::new();
    let mut at = 0;
    for (start, end) in kept.into_iter().chain([(END, END)]) {
        if start > at {
            calls.push(Call::new(SYS_MUNMAP, [at, start - at]));
        }
        at = end;
    }
    stub.run_all(&calls)?;
    Ok(())
}

/// Moves vvar, vvar_vclock and vdso by way of a place that neither they nor the image use, keeping
/// their order; the code finds its data relative to itself.
fn move_kernel_mappings(
    image: &Image,
    space: &AddressSpaceImage,
    own: &[&Mapping],
    stub: &Stub,
    area: &Area,
) -> Result<()> {
    let total: u64 = own.iter().map(|mapping| mapping.length()).sum();
    let parking = parking(image, own, area, total)?;
    let mut calls = Vec::new();
    let mut at = parking;
    let mut parked = Vec::new();
    for mapping in own {
        calls.push(move_to(mapping.start, mapping.length(), at));
        parked.push((mapping.name.as_str(), at, mapping.length()));
        at += mapping.length();
    }
    for (name, at, length) in parked {
        let which = KERNEL_MAPPINGS.iter().position(|known| *known == name);
        let to = space
            .mappings
            .iter()
            .find(|m| which.is_some_and(|which| m.backing == Backing::Kernel(which as u8)))
            .ok_or_else(|| bad_image(format!("{name} is missing")))?;
        calls.push(move_to(at, length, to.start));
    }
    stub.run_all(&calls)?;
    Ok(())
}

fn move_to(from: u64, length: u64, to: u64) -> Call {
    let flags = flag::MREMAP_MAYMOVE | flag::MREMAP_FIXED;
    Call::new(SYS_MREMAP, [from, length, length, flags, to])
}

fn parking(image: &Image, own: &[&Mapping], area: &Area, bytes: u64) -> Result<u64> {
    let mut used: Vec<(u64, u64)> = own
        .iter()
        .map(|mapping| (mapping.start, mapping.end))
        .collect();
    used.push((area.address(), area.address() + AREA_BYTES));
    for space in image.spaces.values() {
        used.extend(
            space
                .mappings
                .iter()
                .map(|mapping| (mapping.start, mapping.end)),
        );
    }
    used.sort_unstable();
    let mut at = 1 << 20;
    for (start, end) in used {
        if start >= at && start - at >= bytes {
            break;
        }
        at = at.max(end);
    }
    if at + bytes > END {
        return Err(obstacle("engine-no-address", "no address is free to park the vdso").into());
    }
    Ok(at)
}

fn map(
    mapping: &MappingImage,
    opened: &BTreeMap<ObjectId, OwnedFd>,
    pid: i32,
) -> Result<Option<Call>> {
    let mut protection = 0;
    for (bit, value) in [
        (vm_flags::READ, flag::PROT_READ),
        (vm_flags::WRITE, flag::PROT_WRITE),
        (vm_flags::EXECUTE, flag::PROT_EXEC),
    ] {
        if mapping.has(bit) {
            protection |= value;
        }
    }
    let mut flags = flag::MAP_FIXED;
    flags |= if mapping.has(vm_flags::SHARED) {
        flag::MAP_SHARED
    } else {
        flag::MAP_PRIVATE
    };
    if mapping.has(vm_flags::GROWS_DOWN) {
        flags |= flag::MAP_GROWSDOWN;
    }
    if mapping.has(vm_flags::NO_RESERVE) {
        flags |= flag::MAP_NORESERVE;
    }
    let (fd, offset) = match mapping.backing {
        Backing::Kernel(_) => return Ok(None),
        Backing::Anonymous => {
            flags |= flag::MAP_ANONYMOUS;
            (u64::MAX, 0)
        }
        Backing::Object(object, offset) => {
            let fd = opened.get(&object).ok_or_else(|| {
                bad_image(format!(
                    "a mapping of object {object}, which does not exist"
                ))
                .pid(pid)
            })?;
            (fd.as_raw_fd() as u64, offset)
        }
    };
    let length = mapping.end - mapping.start;
    Ok(Some(Call::new(
        SYS_MMAP,
        [mapping.start, length, protection, flags, fd, offset],
    )))
}

fn advise(mapping: &MappingImage) -> Vec<Call> {
    let length = mapping.end - mapping.start;
    if matches!(mapping.backing, Backing::Kernel(_)) {
        return Vec::new();
    }
    [
        (vm_flags::DONT_FORK, flag::MADV_DONTFORK),
        (vm_flags::WIPE_ON_FORK, flag::MADV_WIPEONFORK),
        (vm_flags::DONT_DUMP, flag::MADV_DONTDUMP),
        (vm_flags::HUGE_PAGE, flag::MADV_HUGEPAGE),
        (vm_flags::NO_HUGE_PAGE, flag::MADV_NOHUGEPAGE),
        (vm_flags::MERGEABLE, flag::MADV_MERGEABLE),
        (vm_flags::SEQUENTIAL, flag::MADV_SEQUENTIAL),
        (vm_flags::RANDOM, flag::MADV_RANDOM),
    ]
    .into_iter()
    .filter(|(bit, _)| mapping.has(*bit))
    .map(|(_, advice)| Call::new(SYS_MADVISE, [mapping.start, length, advice]))
    .collect()
}

/// Locks memory that was locked, once it is filled (mlock2(2)).
pub fn lock_memory(space: &AddressSpaceImage, stub: &Stub) -> Result<()> {
    const ON_FAULT: u64 = 1;
    let calls: Vec<Call> = space
        .mappings
        .iter()
        .filter(|mapping| mapping.has(vm_flags::LOCKED))
        .map(|mapping| {
            let on_fault = if mapping.has(vm_flags::LOCK_ON_FAULT) {
                ON_FAULT
            } else {
                0
            };
            Call::new(
                SYS_MLOCK2,
                [mapping.start, mapping.end - mapping.start, on_fault],
            )
        })
        .collect();
    stub.run_all(&calls)?;
    Ok(())
}

/// Tells the kernel where code, data, heap, stack, arguments, environment and program are
/// (prctl(2), PR_SET_MM_MAP).
fn set_bounds(
    space: &AddressSpaceImage,
    stub: &Stub,
    opened: &BTreeMap<ObjectId, OwnedFd>,
) -> Result<()> {
    const AUXV_LIMIT: usize = 4096;
    if space.auxiliary_vector.len() > AUXV_LIMIT {
        return Err(bad_image("the auxiliary vector is too long")
            .pid(space.pid)
            .into());
    }
    let program = opened
        .get(&space.program)
        .ok_or_else(|| bad_image("the program's file is missing").pid(space.pid))?;
    let auxv = stub.put(1024, &space.auxiliary_vector)?;
    let mut bytes: Vec<u8> = space
        .bounds
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(&auxv.to_ne_bytes());
    bytes.extend_from_slice(&(space.auxiliary_vector.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&(program.as_raw_fd() as u32).to_ne_bytes());
    let address = stub.put(0, &bytes)?;
    stub.call(
        SYS_PRCTL,
        [
            flag::PR_SET_MM,
            flag::PR_SET_MM_MAP,
            address,
            bytes.len() as u64,
            0,
        ],
    )?;
    Ok(())
}

/// Writes a run into pages that the program itself may not write.
pub fn fill_forced(stub: &Stub, run: &PageRun, bytes: &[u8]) -> Result<()> {
    for (address, position, length) in run.pieces(page_size()) {
        memory::write_forced(stub.tid(), address, &bytes[position..position + length])
            .map_err(|error| failure("filling memory", &error).address(format!("{address:#x}")))?;
    }
    Ok(())
}

/// Address of a `syscall` instruction in the vdso.
pub fn system_call_instruction(space: &AddressSpaceImage, stub: &Stub) -> Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let vdso = space
        .mappings
        .iter()
        .find(|mapping| mapping.backing == Backing::Kernel(0))
        .ok_or_else(|| bad_image("the vdso is missing"))?;
    let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
    memory::read(stub.tid(), vdso.start, &mut bytes)
        .map_err(|error| failure("reading the vdso", &error))?;
    let at = bytes
        .windows(2)
        .position(|pair| pair == SYSCALL)
        .ok_or_else(|| {
            obstacle(
                "engine-vdso",
                "this kernel's vdso has no system call instruction",
            )
        })?;
    Ok(vdso.start + at as u64)
}
