//! Making kernel objects behind descriptors, and looking into them without changing them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn own(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pipe: read end, write end. `flags` as for pipe2(2).
pub fn pipe(flags: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` is live and has room for two.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), flags as i32 | libc::O_CLOEXEC) })?;
    Ok((own(ends[0])?, own(ends[1])?))
}

/// Capacity of a pipe in bytes (F_GETPIPE_SZ).
pub fn pipe_capacity(end: impl AsFd) -> io::Result<u32> {
    // SAFETY: integers only.
    check(unsafe { libc::fcntl(end.as_fd().as_raw_fd(), libc::F_GETPIPE_SZ) })
        .map(|size| size as u32)
}

/// Sets the capacity of a pipe (F_SETPIPE_SZ); EPERM above /proc/sys/fs/pipe-max-size.
pub fn set_pipe_capacity(end: impl AsFd, bytes: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::fcntl(end.as_fd().as_raw_fd(), libc::F_SETPIPE_SZ, bytes as i32) })
        .map(drop)
}

/// Content of a pipe, untouched, in the pieces in which a packet reader would get it (tee(2)).
pub fn pipe_content(read_end: impl AsFd) -> io::Result<Vec<Vec<u8>>> {
    let capacity = pipe_capacity(&read_end)?;
    let (copy, into) = pipe(libc::O_NONBLOCK as u32)?;
    set_pipe_capacity(&into, capacity)?;
    // SAFETY: integers only; SPLICE_F_NONBLOCK makes an empty pipe an error and not a wait.
    let copied = unsafe {
        libc::tee(
            read_end.as_fd().as_raw_fd(),
            into.as_raw_fd(),
            capacity as usize,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    if copied < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock {
            Ok(Vec::new())
        } else {
            Err(error)
        };
    }
    drop(into);
    let mut pieces = Vec::new();
    let mut copy = File::from(copy);
    let mut buffer = vec![0; capacity.max(65_536) as usize];
    loop {
        match copy.read(&mut buffer)? {
            0 => return Ok(pieces),
            count => pieces.push(buffer[..count].to_vec()),
        }
    }
}

/// What poll(2) reports about a descriptor right now.
pub fn poll_now(fd: impl AsFd, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one live entry.
    check(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// Sets file status flags (F_SETFL): O_APPEND, O_NONBLOCK, O_DIRECT, O_ASYNC, O_NOATIME.
pub fn set_status_flags(fd: impl AsFd, flags: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFL, flags as i32) }).map(drop)
}

/// An eventfd(2) with this counter.
pub fn eventfd(count: u64, semaphore: bool) -> io::Result<OwnedFd> {
    let semaphore = if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: integers only.
    let fd = own(unsafe { libc::eventfd(0, semaphore | libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    if count > 0 {
        let bytes = count.to_ne_bytes();
        // SAFETY: eight live bytes.
        let written = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        if written != 8 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(fd)
}

/// An empty epoll(7) instance.
pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

/// A signalfd(2) for these signals, bit n-1 for signal n.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the mask is live and of the kernel's size, 8 bytes.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            8usize,
            libc::SFD_CLOEXEC,
        )
    };
    own(fd as i32)
}

/// A timerfd_create(2) timer that first expires after `value` nanoseconds (0: disarmed) and then
/// every `interval`, with `ticks` expirations not yet read (TFD_IOC_SET_TICKS, Linux 3.17).
pub fn timerfd(clock: i32, value: u64, interval: u64, ticks: u64) -> io::Result<OwnedFd> {
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: integers only.
    let fd = own(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) })?;
    let time = |nanoseconds: u64| libc::timespec {
        tv_sec: (nanoseconds / 1_000_000_000) as i64,
        tv_nsec: (nanoseconds % 1_000_000_000) as i64,
    };
    // An expired periodic timer goes on when it is read; a value of 0 would disarm it.
    let value = if value == 0 && interval > 0 && ticks > 0 {
        1
    } else {
        value
    };
    let setting = libc::itimerspec {
        it_interval: time(interval),
        it_value: time(value),
    };
    // SAFETY: a live struct; no old value is asked for.
    check(unsafe {
        libc::timerfd_settime(fd.as_raw_fd(), 0, &raw const setting, std::ptr::null_mut())
    })?;
    if ticks > 0 {
        // SAFETY: a live 64-bit word.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) })?;
    }
    Ok(fd)
}

/// Shared anonymous memory of this size, as `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes it, behind a
/// descriptor (/proc/self/map_files, needs CAP_CHECKPOINT_RESTORE).
pub fn shared_memory(bytes: u64) -> io::Result<File> {
    let length = bytes.next_multiple_of(crate::sys::page_size());
    // SAFETY: a fresh mapping placed by the kernel; nothing refers to it.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (start, end) = (address as u64, address as u64 + length);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/map_files/{start:x}-{end:x}"));
    // SAFETY: unmaps exactly what was mapped above; the open file keeps the object.
    unsafe { libc::munmap(address, length as usize) };
    file
}

/// Ranges (start, end) of a file that hold data (SEEK_DATA, SEEK_HOLE).
pub fn data_ranges(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let seek = |from: u64, whence: i32| -> io::Result<Option<u64>> {
        // SAFETY: integers only.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENXIO) {
            Ok(None)
        } else {
            Err(error)
        }
    };
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(at, libc::SEEK_DATA)? {
        let Some(end) = seek(start, libc::SEEK_HOLE)? else {
            break;
        };
        ranges.push((start, end));
        at = end;
    }
    Ok(ranges)
}

/// Makes a bound socket take connections (listen(2)).
pub fn listen(socket: impl AsFd, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // SAFETY: integers only.
    check(unsafe { libc::listen(socket.as_fd().as_raw_fd(), backlog) }).map(drop)
}
