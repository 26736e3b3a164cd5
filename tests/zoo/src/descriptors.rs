//! Descriptors: opening, reading, writing, and their flags, with errno kept.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Turns a -1 into errno.
///
/// # Errors
/// The errno.
pub fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Wraps a descriptor that a system call has just returned.
///
/// # Errors
/// The errno if the call failed.
pub fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the number was just returned by the kernel, so nobody else owns it.
    checked(result).map(|number| unsafe { OwnedFd::from_raw_fd(number) })
}

/// `open(2)`; a file that `O_CREAT` makes has mode 0600.
///
/// # Errors
/// As open(2).
pub fn open(path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a valid C string.
    owned(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}

/// `pipe2(2)`: the reading end first.
///
/// # Errors
/// As pipe(2).
pub fn pipe(flags: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the array has room for the two numbers.
    checked(unsafe { libc::pipe2(ends.as_mut_ptr(), flags) })?;
    Ok((owned(ends[0])?, owned(ends[1])?))
}

/// One `read(2)` of at most `most` bytes, again after EINTR. Empty means end of file.
///
/// # Errors
/// As read(2).
pub fn read(descriptor: impl AsFd, most: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0_u8; most];
    loop {
        // SAFETY: the buffer is valid for `most` bytes.
        let count = unsafe {
            libc::read(
                descriptor.as_fd().as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                most,
            )
        };
        if count >= 0 {
            buffer.truncate(count as usize);
            return Ok(buffer);
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Reads until `length` bytes are there.
///
/// # Errors
/// As read(2); `UnexpectedEof` when the stream ends before.
pub fn read_exactly(descriptor: impl AsFd, length: usize) -> io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(length);
    while data.len() < length {
        let part = read(&descriptor, length - data.len())?;
        if part.is_empty() {
            let text = format!("end of file after {} of {length} bytes", data.len());
            return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
        }
        data.extend_from_slice(&part);
    }
    Ok(data)
}

/// One `write(2)`, again after EINTR: how many bytes were taken.
///
/// # Errors
/// As write(2).
pub fn write(descriptor: impl AsFd, data: &[u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the data is valid for its length.
        let count = unsafe {
            libc::write(
                descriptor.as_fd().as_raw_fd(),
                data.as_ptr().cast(),
                data.len(),
            )
        };
        if count >= 0 {
            return Ok(count as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Writes all of the data.
///
/// # Errors
/// As write(2).
pub fn write_all(descriptor: impl AsFd, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let count = write(&descriptor, data)?;
        data = &data[count..];
    }
    Ok(())
}

/// The descriptor's position (`lseek`).
///
/// # Errors
/// As lseek(2).
pub fn position(descriptor: impl AsFd) -> io::Result<u64> {
    seek(descriptor, 0, libc::SEEK_CUR)
}

/// `lseek(2)`.
///
/// # Errors
/// As lseek(2).
pub fn seek(descriptor: impl AsFd, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: lseek has no memory arguments.
    let result = unsafe { libc::lseek(descriptor.as_fd().as_raw_fd(), offset, whence) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as u64)
    }
}

/// `fcntl(2)` with an integer argument.
///
/// # Errors
/// As fcntl(2).
pub fn control(descriptor: impl AsFd, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: the commands used by the zoo take an integer.
    checked(unsafe { libc::fcntl(descriptor.as_fd().as_raw_fd(), command, argument) })
}

/// The status flags (`F_GETFL`).
///
/// # Errors
/// As fcntl(2).
pub fn status_flags(descriptor: impl AsFd) -> io::Result<i32> {
    control(descriptor, libc::F_GETFL, 0)
}

/// Sets or clears `O_NONBLOCK`.
///
/// # Errors
/// As fcntl(2).
pub fn set_nonblocking(descriptor: impl AsFd, on: bool) -> io::Result<()> {
    let flags = status_flags(&descriptor)?;
    let flags = if on {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    control(descriptor, libc::F_SETFL, flags).map(drop)
}

/// A second descriptor of the same open file, with or without close-on-exec.
///
/// # Errors
/// As fcntl(2).
pub fn duplicate(descriptor: impl AsFd, least: RawFd, close_on_exec: bool) -> io::Result<OwnedFd> {
    let command = if close_on_exec {
        libc::F_DUPFD_CLOEXEC
    } else {
        libc::F_DUPFD
    };
    owned(control(descriptor, command, least)?)
}

/// `poll(2)` for one descriptor: the events that are true now, after at most `timeout` ms (-1 for ever).
///
/// # Errors
/// As poll(2).
pub fn poll(descriptor: impl AsFd, events: i16, timeout: i32) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: descriptor.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry is passed and one is there.
    checked(unsafe { libc::poll(&mut entry, 1, timeout) })?;
    Ok(entry.revents)
}

/// Every open descriptor above stdio with what `/proc/self/fd` says it is.
///
/// # Errors
/// `/proc` cannot be read.
pub fn table() -> io::Result<BTreeMap<RawFd, PathBuf>> {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<RawFd>().ok());
        // The descriptor of this very listing is gone when its link is read after the loop; skip it.
        if let (Some(number), Ok(target)) = (number, fs::read_link(entry.path()))
            && number > 2
            && !target.ends_with("fd")
        {
            open.insert(number, target);
        }
    }
    Ok(open)
}
