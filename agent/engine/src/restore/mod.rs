//! Restore of a tree: read the image, build processes, fill them, finish them, let them run.
//!
//! Each step is a value that the next one consumes. Dropping any of them ends what is half built;
//! its sockets are still under repair, so nothing of it reaches a peer.

mod address_space;
mod image;
mod processes;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::PageRun;
use crcoord_common::wire::engine::RestoreTarget;
use crcoord_kernel::namespace::{Namespace, NamespaceKind};
use crcoord_kernel::net::lock::NetworkLock;
use crcoord_kernel::number::{SYS_MUNMAP, flag};
use crcoord_kernel::ptrace::Stop;
use crcoord_kernel::stub::{AREA_BYTES, Area, Call, Stub};
use crcoord_kernel::sys;

use crate::error::{Result, bad_image, failure, obstacle};
use crate::pages;
use crate::resources::{DESCRIPTORS, RestoreContext, descriptors, shared_memory};
use image::Image;

/// Processes under construction, ended when dropped.
#[derive(Debug, Default)]
struct Stubs {
    /// Main threads by pid inside the job.
    main: BTreeMap<i32, Stub>,
    /// Other threads by process and tid inside the job.
    threads: BTreeMap<(i32, i32), Stub>,
}

impl Drop for Stubs {
    fn drop(&mut self) {
        const SIGKILL: i32 = 9;
        for stub in self.main.values() {
            // Gone already is as good.
            let _ = sys::kill(stub.tid(), SIGKILL);
        }
        for stub in self.threads.values().chain(self.main.values()) {
            while let Ok(stop) = stub.tracee().wait() {
                if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                    break;
                }
            }
        }
    }
}

/// A tree whose processes and mappings exist and wait for their pages.
#[derive(Debug)]
pub struct Building {
    target: Box<RestoreTarget>,
    image: Image,
    area: Area,
    stubs: Stubs,
    /// Open objects and what else restores of resources share, without the target.
    opened: BTreeMap<ObjectId, OwnedFd>,
    descriptor_base: i32,
    connections: Vec<crate::resources::tcp::WaitingConnection>,
    lock: Option<NetworkLock>,
    root: Option<OwnedFd>,
    directories: BTreeMap<i32, OwnedFd>,
    shared: BTreeMap<ObjectId, File>,
    filled: u64,
}

impl Building {
    /// Reads the image's records, opens all objects, and makes processes and mappings. The calling
    /// process must have one thread only; it must end soon after, for it has entered the capsule's
    /// network namespace.
    pub fn begin(target: Box<RestoreTarget>) -> Result<Building> {
        let image = Image::decode(&target)?;
        sys::raise_descriptor_limit().map_err(|error| failure("raising limits", &error))?;
        let capsule = target.capsule.map(Capsule::open).transpose()?;
        if let Some(capsule) = &capsule {
            capsule.enter()?;
        }
        let root = capsule
            .as_ref()
            .and_then(|capsule| capsule.root.try_clone().ok());
        let mut context = RestoreContext {
            target: &target,
            opened: BTreeMap::new(),
            descriptor_base: image.descriptor_base()?,
            connections: Vec::new(),
            lock: None,
            root,
        };
        let shared = image.open_memory(&mut context)?;
        for kind in DESCRIPTORS {
            let records = image.of_kind(kind.name);
            if !records.is_empty() {
                (kind.open)(&mut context, &records)?;
            }
        }
        let mut directories = BTreeMap::new();
        for process in image.living() {
            directories.insert(process.pid, process.open_directory(&context)?);
        }
        let RestoreContext {
            opened,
            descriptor_base,
            connections,
            lock,
            root,
            ..
        } = context;
        let area = Area::map(image.free_address(AREA_BYTES)?)?;
        let mut stubs = Stubs::default();
        processes::create(&image, &area, capsule.as_ref(), &target, &mut stubs)?;
        for (pid, stub) in &stubs.main {
            if let Some(space) = image.spaces.get(pid) {
                address_space::restore(&image, space, stub, &area, &opened)?;
            }
        }
        Ok(Building {
            image,
            area,
            stubs,
            opened,
            descriptor_base,
            connections,
            lock,
            root,
            directories,
            shared,
            filled: 0,
            target,
        })
    }

    /// Writes one run of pages where it belongs.
    pub fn fill(&mut self, run: &PageRun, bytes: &[u8]) -> Result<()> {
        if run.bytes(sys::page_size()) != bytes.len() as u64 {
            return Err(bad_image("a run of pages has the wrong length").into());
        }
        if !self.image.may_fill(run) {
            return Err(bad_image("pages lie outside of the memory they belong to")
                .address(format!("{:#x}", run.start()))
                .into());
        }
        self.filled += bytes.len() as u64;
        if let Some(file) = self.shared.get(&run.object) {
            return shared_memory::fill(file, run, bytes);
        }
        let stub = self
            .image
            .owner_of(run.object)
            .and_then(|pid| self.stubs.main.get(&pid))
            .ok_or_else(|| bad_image(format!("pages of unknown object {}", run.object)))?;
        match pages::fill(stub.tid(), run, bytes) {
            Ok(()) => Ok(()),
            // Read-only pages: the tracer may write them all the same.
            Err(_) => address_space::fill_forced(stub, run, bytes),
        }
    }

    /// Makes everything else: descriptors, threads, signals, timers, identities. Afterwards every
    /// thread stands before its first instruction.
    pub fn finish(mut self) -> Result<Built> {
        let mut context = RestoreContext {
            target: &self.target,
            opened: std::mem::take(&mut self.opened),
            descriptor_base: self.descriptor_base,
            connections: std::mem::take(&mut self.connections),
            lock: self.lock.take(),
            root: self.root.take(),
        };
        for (pid, stub) in &self.stubs.main {
            let Some(process) = self.image.processes.get(pid) else {
                continue;
            };
            if process.zombie.is_some() {
                continue;
            }
            if let Some(directory) = self.directories.get(pid) {
                process.restore_early(stub, directory)?;
            }
            if let Some(table) = self.image.tables.get(pid) {
                descriptors::restore(&context, stub, table)?;
            } else {
                descriptors::restore(
                    &context,
                    stub,
                    &descriptors::DescriptorTable {
                        pid: *pid,
                        entries: Vec::new(),
                    },
                )?;
            }
        }
        for kind in DESCRIPTORS {
            let records = self.image.of_kind(kind.name);
            if let (Some(finish), false) = (kind.finish, records.is_empty()) {
                finish(&mut context, &self.stubs.main, &records)?;
            }
        }
        for (pid, stub) in &self.stubs.main {
            if self
                .image
                .processes
                .get(pid)
                .is_some_and(|process| process.zombie.is_none())
            {
                descriptors::close_rest(&context, stub)?;
            }
        }
        // The trees hold what they need; the engine keeps only what it must do something with.
        context.opened.clear();
        self.directories.clear();
        self.shared.clear();
        processes::end_zombies(&self.image, &mut self.stubs)?;
        let pids: Vec<i32> = self.stubs.main.keys().copied().collect();
        for pid in pids {
            processes::finish(&self.image, pid, &mut self.stubs, &self.target)?;
            self.leave_area(pid)?;
        }
        let RestoreContext {
            connections, lock, ..
        } = context;
        Ok(Built {
            stubs: self.stubs,
            root: self.image.roots.first().copied().unwrap_or(0),
            connections,
            lock,
            filled: self.filled,
        })
    }

    /// The very last step of a process: the builder's area goes, by a `syscall` instruction of the
    /// vdso, and all threads get their registers.
    fn leave_area(&self, pid: i32) -> Result<()> {
        let (Some(stub), Some(space)) = (self.stubs.main.get(&pid), self.image.spaces.get(&pid))
        else {
            return Ok(());
        };
        let instruction = address_space::system_call_instruction(space, stub)?;
        if let Some(signals) = self.image.signals.get(&pid) {
            signals.restore_trap(stub, instruction)?;
        }
        let call = Call::new(SYS_MUNMAP, [self.area.address(), AREA_BYTES]);
        stub.call_from(instruction, call)?;
        processes::set_registers(&self.image, pid, &self.stubs)
    }
}

/// A whole tree, every thread before its first instruction.
#[derive(Debug)]
pub struct Built {
    stubs: Stubs,
    root: i32,
    connections: Vec<crate::resources::tcp::WaitingConnection>,
    lock: Option<NetworkLock>,
    filled: u64,
}

impl Built {
    /// Pid of the (first) root process inside the job.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Bytes of pages written.
    pub fn filled(&self) -> u64 {
        self.filled
    }

    /// Unlocks the network and lets everything run.
    pub fn resume(mut self) -> Result<()> {
        // Freed after the tree runs: that waits for the kernel.
        let _lifted = self
            .lock
            .take()
            .map(NetworkLock::unlock)
            .transpose()
            .map_err(|error| obstacle("engine-network-lock", error.to_string()))?;
        for connection in self.connections.drain(..) {
            connection.finish()?;
        }
        let threads = std::mem::take(&mut self.stubs.threads);
        let main = std::mem::take(&mut self.stubs.main);
        for stub in threads.into_values().chain(main.into_values()) {
            stub.release()?;
        }
        Ok(())
    }
}

/// Namespaces of a capsule, by its PID 1.
#[derive(Debug)]
struct Capsule {
    namespaces: Vec<Namespace>,
    pid: Namespace,
    network: Namespace,
    root: OwnedFd,
}

impl Capsule {
    fn open(init: i32) -> Result<Capsule> {
        let open = |kind| {
            Namespace::of_process(init, kind).map_err(|error| {
                obstacle(
                    "engine-capsule-gone",
                    format!("the capsule cannot be entered: {error}"),
                )
                .pid(init)
            })
        };
        const O_PATH: u32 = 0o10_000_000;
        const O_DIRECTORY: u32 = 0o200_000;
        let root = sys::open_in_root(None, &format!("/proc/{init}/root"), O_PATH | O_DIRECTORY)
            .map_err(|error| failure("opening the capsule's root", &error).pid(init))?;
        Ok(Capsule {
            namespaces: vec![
                open(NamespaceKind::Ipc)?,
                open(NamespaceKind::Uts)?,
                open(NamespaceKind::Network)?,
                open(NamespaceKind::Mount)?,
            ],
            pid: open(NamespaceKind::Pid)?,
            network: open(NamespaceKind::Network)?,
            root: root.into(),
        })
    }

    /// The engine's children will be in the capsule's PID namespace, its sockets in the capsule's
    /// network. Its own view of files and processes stays the node's.
    fn enter(&self) -> Result<()> {
        for namespace in [&self.pid, &self.network] {
            namespace.enter().map_err(|error| {
                obstacle(
                    "engine-capsule",
                    format!("the capsule cannot be entered: {error}"),
                )
            })?;
        }
        Ok(())
    }
}

/// `CLONE_*` flags of a thread of the same process.
const THREAD_FLAGS: u64 = flag::CLONE_VM
    | flag::CLONE_FS
    | flag::CLONE_FILES
    | flag::CLONE_SIGHAND
    | flag::CLONE_THREAD
    | flag::CLONE_SYSVSEM;
