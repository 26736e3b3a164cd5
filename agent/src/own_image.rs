//! A sealed copy of the own binary in memory: what capsules run, so that replacing or unmounting the
//! installed file never touches a running job, and nobody can write to what runs as root.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The copy; one for all capsules of an agent. Memory is shared between all that run it.
#[derive(Debug)]
pub struct OwnImage {
    memory: OwnedFd,
}

impl OwnImage {
    /// Copies `/proc/self/exe` and seals the copy (`memfd_create(2)`, Linux 3.17).
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create() -> io::Result<Self> {
        Self::of(&mut File::open("/proc/self/exe")?)
    }

    /// The same of another program's file.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn of(program: &mut File) -> io::Result<Self> {
        let memory = memfd_create("crcoord", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut copy = File::from(memory);
        io::copy(program, &mut copy)?;
        // Reopened for reading: exec of a file that anybody has open for writing is ETXTBSY.
        let memory: OwnedFd = File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))?.into();
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&copy, seals)?;
        Ok(OwnImage { memory })
    }

    /// A path by which a child of this process can execute it.
    pub fn path(&self) -> String {
        format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.memory.as_raw_fd()
        )
    }
}
