//! Mappings of the program, read and written without trusting their protection.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;
use std::{fs, ptr};

use crate::{Explain, Outcome, ensure, pattern};

/// The page size of x86_64 in bytes.
pub const PAGE: usize = 4096;

/// Readable and writable.
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapped range that is never unmapped by drop: its life is part of what is tested.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    /// Anonymous memory, `flags` beside `MAP_ANONYMOUS` (private or shared).
    ///
    /// # Errors
    /// As mmap(2).
    pub fn anonymous(length: usize, protection: i32, flags: i32) -> io::Result<Mapping> {
        Mapping::map(0, length, protection, flags | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Private anonymous memory at exactly this address, refused where something is mapped.
    ///
    /// # Errors
    /// As mmap(2); EEXIST where the range is not free.
    pub fn anonymous_at(address: usize, length: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        Mapping::map(address, length, READ_WRITE, flags, -1, 0)
    }

    /// A file from `offset` on.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn file(
        descriptor: RawFd,
        offset: usize,
        length: usize,
        protection: i32,
        flags: i32,
    ) -> io::Result<Mapping> {
        Mapping::map(0, length, protection, flags, descriptor, offset)
    }

    /// A second view of part of a *shared* mapping (`mremap` with an old size of zero).
    ///
    /// # Errors
    /// As mremap(2); EINVAL for a private mapping.
    pub fn second_view(&self, offset: usize, length: usize) -> io::Result<Mapping> {
        let old = (self.address + offset) as *mut libc::c_void;
        // SAFETY: with an old size of zero nothing is moved; the kernel chooses a free range.
        let address = unsafe { libc::mremap(old, 0, length, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: address as usize,
            length,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Its length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Its pages' numbers.
    pub fn pages(&self) -> Range<usize> {
        0..self.length / PAGE
    }

    /// The bytes of the range, by `process_vm_readv` on itself: EFAULT instead of a fault.
    ///
    /// # Errors
    /// EFAULT where it is not readable.
    pub fn read(&self, offset: usize, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0_u8; length];
        let local = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: length,
        };
        let remote = self.vector(offset, length)?;
        // SAFETY: local is a buffer of ours; the remote side is checked by the kernel.
        let count = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        if count == length as isize {
            Ok(buffer)
        } else {
            Err(failed_transfer(count))
        }
    }

    /// Writes bytes into the range, by `process_vm_writev` on itself.
    ///
    /// # Errors
    /// EFAULT where it is not writable.
    pub fn write(&self, offset: usize, data: &[u8]) -> io::Result<()> {
        let local = libc::iovec {
            iov_base: data.as_ptr() as *mut _,
            iov_len: data.len(),
        };
        let remote = self.vector(offset, data.len())?;
        // SAFETY: only this mapping is written, which nothing but the zoo's checks look at.
        let count = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
        if count == data.len() as isize {
            Ok(())
        } else {
            Err(failed_transfer(count))
        }
    }

    /// Fills one page with the stream `seed`.
    ///
    /// # Errors
    /// The page is not writable.
    pub fn fill_page(&self, page: usize, seed: u64) -> Outcome {
        self.write(
            page * PAGE,
            &pattern::bytes(seed, (page * PAGE) as u64, PAGE),
        )
        .explain(format!("cannot fill page {page} at {:#x}", self.address))
    }

    /// Requires one page to hold the stream `seed`.
    ///
    /// # Errors
    /// It does not, or it cannot be read.
    pub fn check_page(&self, page: usize, seed: u64, what: &str) -> Outcome {
        self.check(
            page * PAGE,
            &pattern::bytes(seed, (page * PAGE) as u64, PAGE),
            what,
        )
    }

    /// Requires one page to hold only zeros.
    ///
    /// # Errors
    /// It does not, or it cannot be read.
    pub fn check_zero_page(&self, page: usize, what: &str) -> Outcome {
        self.check(page * PAGE, &[0; PAGE], what)
    }

    /// Requires these bytes at the offset.
    ///
    /// # Errors
    /// They differ, or cannot be read.
    pub fn check(&self, offset: usize, expected: &[u8], what: &str) -> Outcome {
        let address = self.address + offset;
        let found = self
            .read(offset, expected.len())
            .explain(format!("{what}: {address:#x} is not readable"))?;
        let difference = pattern::first_difference(&found, expected);
        ensure!(
            difference.is_none(),
            "{what}: wrong content at {:#x}",
            address + difference.unwrap_or(0)
        );
        Ok(())
    }

    /// `mprotect(2)` of part of the range.
    ///
    /// # Errors
    /// As mprotect(2).
    pub fn protect(&self, offset: usize, length: usize, protection: i32) -> io::Result<()> {
        let address = self.vector(offset, length)?.iov_base;
        // SAFETY: only this mapping changes, and no Rust reference into it is held across the call.
        if unsafe { libc::mprotect(address, length, protection) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// `munmap(2)` of part of the range.
    ///
    /// # Errors
    /// As munmap(2).
    pub fn unmap(&self, offset: usize, length: usize) -> io::Result<()> {
        let address = self.vector(offset, length)?.iov_base;
        // SAFETY: only this mapping goes, and no Rust reference into it is held across the call.
        if unsafe { libc::munmap(address, length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// `madvise(2)` of the whole range.
    ///
    /// # Errors
    /// As madvise(2).
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the kinds of advice used change no content that a Rust reference looks at.
        if unsafe { libc::madvise(self.address as *mut _, self.length, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The range as atomic words, for memory that is used while the program waits.
    ///
    /// # Safety
    /// The whole range is mapped readable and writable as long as the slice is used.
    pub unsafe fn words(&self) -> &'static [AtomicU64] {
        let count = self.length / size_of::<AtomicU64>();
        // SAFETY: mapped and writable by the caller's promise, page aligned, and atomics may be shared.
        unsafe { std::slice::from_raw_parts(ptr::with_exposed_provenance(self.address), count) }
    }

    /// The permissions of every page as `/proc/self/maps` shows them (`rwxp`), None where nothing is mapped.
    /// By page, because neighbours with equal permissions may be one entry or several.
    ///
    /// # Errors
    /// `/proc/self/maps` cannot be read.
    pub fn permissions(&self) -> Outcome<Vec<Option<String>>> {
        let entries = map_entries()?;
        Ok(self
            .pages()
            .map(|page| {
                let address = self.address + page * PAGE;
                let entry = entries.iter().find(|entry| entry.range.contains(&address));
                entry.map(|entry| entry.permissions.clone())
            })
            .collect())
    }

    fn map(
        address: usize,
        length: usize,
        protection: i32,
        flags: i32,
        descriptor: RawFd,
        offset: usize,
    ) -> io::Result<Mapping> {
        let hint = address as *mut libc::c_void;
        // SAFETY: the kernel chooses a free range, or refuses a fixed one that is taken (NOREPLACE).
        let address = unsafe {
            libc::mmap(
                hint,
                length,
                protection,
                flags,
                descriptor,
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: address.expose_provenance(),
            length,
        })
    }

    fn vector(&self, offset: usize, length: usize) -> io::Result<libc::iovec> {
        if offset + length > self.length {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        Ok(libc::iovec {
            iov_base: (self.address + offset) as *mut _,
            iov_len: length,
        })
    }
}

/// One line of `/proc/self/maps`.
#[derive(Clone, Debug)]
pub struct MapEntry {
    /// The addresses.
    pub range: Range<usize>,
    /// As printed: `rwxp`.
    pub permissions: String,
    /// The path or the name in brackets; may be empty.
    pub name: String,
}

/// All of `/proc/self/maps`.
///
/// # Errors
/// It cannot be read or a line is not understood.
pub fn map_entries() -> Outcome<Vec<MapEntry>> {
    let text = fs::read_to_string("/proc/self/maps").explain("/proc/self/maps")?;
    text.lines()
        .map(|line| {
            let mut columns = line.split_whitespace();
            let range = columns.next().and_then(|range| range.split_once('-'));
            let (start, end) = range.explain(format!("maps line {line:?}"))?;
            let start = usize::from_str_radix(start, 16).explain("maps")?;
            let end = usize::from_str_radix(end, 16).explain("maps")?;
            let permissions = columns.next().unwrap_or_default().to_owned();
            let name = columns.nth(3).unwrap_or_default().to_owned();
            Ok(MapEntry {
                range: start..end,
                permissions,
                name,
            })
        })
        .collect()
}

fn failed_transfer(count: isize) -> io::Error {
    if count < 0 {
        io::Error::last_os_error()
    } else {
        // A short count means that the range stops being accessible somewhere inside.
        io::Error::from_raw_os_error(libc::EFAULT)
    }
}
