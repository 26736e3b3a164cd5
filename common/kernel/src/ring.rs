//! A ring of equal slots in a memfd, mapped by two processes: how page bytes get from an engine to
//! its agent without a copy through a socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// The mapped ring. Which side may touch a slot is agreed by messages; a slot that both sides touch
/// at once holds garbage bytes, which the hashes of chunks make visible.
#[derive(Debug)]
pub struct Ring {
    base: NonNull<u8>,
    slots: u32,
    slot_bytes: usize,
    memory: OwnedFd,
}

// SAFETY: the mapping is plain memory that lives as long as the value and is not tied to a thread.
unsafe impl Send for Ring {}
// SAFETY: all access through `&Ring` is raw copies in and out; see `read` and `write`.
unsafe impl Sync for Ring {}

impl Ring {
    /// Makes a ring. The memfd is sealed against shrinking, so that neither side can make the other
    /// fault (`memfd_create(2)`, `F_SEAL_SHRINK`, Linux 3.17).
    pub fn create(slots: u32, slot_bytes: usize) -> io::Result<Ring> {
        // SAFETY: the name is a valid C string; the call has no other memory effects.
        let fd = unsafe {
            libc::memfd_create(
                c"crcoord-ring".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and is owned by nobody else.
        let memory = unsafe { OwnedFd::from_raw_fd(fd) };
        let file = std::fs::File::from(memory);
        file.set_len(u64::from(slots) * slot_bytes as u64)?;
        let memory = OwnedFd::from(file);
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: F_ADD_SEALS takes an int and touches no memory of ours.
        if unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(memory, slots, slot_bytes)
    }

    /// Maps a ring that the other side has made; its size and seals are checked.
    pub fn open(memory: OwnedFd, slots: u32, slot_bytes: usize) -> io::Result<Ring> {
        // SAFETY: F_GET_SEALS touches no memory of ours.
        let seals = unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_GET_SEALS) };
        let file = std::fs::File::from(memory);
        let size = file.metadata()?.len();
        if seals & libc::F_SEAL_SHRINK == 0 || size != u64::from(slots) * slot_bytes as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a ring of this size",
            ));
        }
        Self::map(OwnedFd::from(file), slots, slot_bytes)
    }

    fn map(memory: OwnedFd, slots: u32, slot_bytes: usize) -> io::Result<Ring> {
        // SAFETY: a fresh shared mapping of a descriptor we own, placed by the kernel.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                slots as usize * slot_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Ring {
            base,
            slots,
            slot_bytes,
            memory,
        })
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Copies the first `length` bytes of a slot out. The copy is made once and only then looked at,
    /// so a peer that writes meanwhile cannot change what was checked.
    ///
    /// Fails when the slot or the length is out of range.
    pub fn read(&self, slot: u32, length: usize) -> io::Result<Vec<u8>> {
        let from = self.slot(slot, length)?;
        let mut bytes = Vec::with_capacity(length);
        // SAFETY: `slot` checked that `length` bytes are inside the mapping; the vector has room for
        // them, and bytes of any value are initialised memory.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), length);
            bytes.set_len(length);
        }
        Ok(bytes)
    }

    /// Copies bytes into the front of a slot.
    pub fn write(&self, slot: u32, bytes: &[u8]) -> io::Result<()> {
        let to = self.slot(slot, bytes.len())?;
        // SAFETY: `slot` checked that the bytes fit into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Address and length of a slot, for system calls that fill or read it.
    pub(crate) fn slot(&self, slot: u32, length: usize) -> io::Result<NonNull<u8>> {
        if slot >= self.slots || length > self.slot_bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no such place in the ring",
            ));
        }
        // SAFETY: the slot is inside the mapping.
        Ok(unsafe { self.base.add(slot as usize * self.slot_bytes) })
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; nothing refers to it any more.
        unsafe {
            libc::munmap(
                self.base.as_ptr().cast(),
                self.slots as usize * self.slot_bytes,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_mappings_see_the_same_bytes() {
        let ring = Ring::create(4, 8192).unwrap();
        let other = Ring::open(ring.as_fd().try_clone_to_owned().unwrap(), 4, 8192).unwrap();
        ring.write(3, b"page").unwrap();
        assert_eq!(other.read(3, 4).unwrap(), b"page");
        assert!(ring.write(4, b"x").is_err());
        assert!(ring.read(0, 8193).is_err());
        assert!(Ring::open(ring.as_fd().try_clone_to_owned().unwrap(), 5, 8192).is_err());
    }
}
