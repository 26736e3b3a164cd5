//! Memory of other processes: process_vm_readv(2), process_vm_writev(2) and, for code and read-only
//! pages of a tracee, /proc/PID/mem.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;

/// A contiguous piece of another process: address and length.
pub type Piece = (u64, usize);

/// Reads pieces of another process into the front of `buffer`, one after the other; short reads are
/// errors (EFAULT).
pub fn read_pieces(pid: i32, pieces: &[Piece], buffer: &mut [u8]) -> io::Result<()> {
    let total: usize = pieces.iter().map(|piece| piece.1).sum();
    let Some(buffer) = buffer.get_mut(..total) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: `buffer` is live and exactly as long as the pieces together.
    unsafe {
        transfer(
            libc::SYS_process_vm_readv,
            pid,
            pieces,
            buffer.as_mut_ptr(),
            total,
        )
    }
}

/// As [`read_pieces`], also from pages that the process itself may not read: those of a tracee are
/// read by /proc/PID/mem.
pub fn read_pieces_forced(pid: i32, pieces: &[Piece], buffer: &mut [u8]) -> io::Result<()> {
    match read_pieces(pid, pieces, buffer) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {}
        other => return other,
    }
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut position = 0;
    for (address, length) in pieces {
        memory.read_exact_at(&mut buffer[position..position + length], *address)?;
        position += length;
    }
    Ok(())
}

/// Reads from another process.
pub fn read(pid: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    read_pieces(pid, &[(address, buffer.len())], buffer)
}

/// Reads one 64-bit word.
pub fn read_word(pid: i32, address: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    read(pid, address, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Writes bytes to pieces of another process, whose protections are honoured.
pub fn write_pieces(pid: i32, pieces: &[Piece], bytes: &[u8]) -> io::Result<()> {
    let total: usize = pieces.iter().map(|piece| piece.1).sum();
    if total != bytes.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `process_vm_writev` only reads from the local buffer, which is `total` bytes long.
    unsafe {
        transfer(
            libc::SYS_process_vm_writev,
            pid,
            pieces,
            bytes.as_ptr().cast_mut(),
            total,
        )
    }
}

/// Writes to another process, whose protections are honoured.
pub fn write(pid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    write_pieces(pid, &[(address, bytes.len())], bytes)
}

/// Writes to a tracee whatever its pages' protections are (a private page is copied first).
pub fn write_forced(pid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?
        .write_all_at(bytes, address)
}

/// # Safety
/// `local` must be valid for `total` bytes, for writing when `number` is `process_vm_readv`.
unsafe fn transfer(
    number: libc::c_long,
    pid: i32,
    pieces: &[Piece],
    local: *mut u8,
    total: usize,
) -> io::Result<()> {
    let mut done = 0;
    // IOV_MAX pieces a call.
    for pieces in pieces.chunks(1024) {
        let length: usize = pieces.iter().map(|piece| piece.1).sum();
        let remote: Vec<libc::iovec> = pieces
            .iter()
            .map(|(address, length)| libc::iovec {
                iov_base: *address as *mut libc::c_void,
                iov_len: *length,
            })
            .collect();
        debug_assert!(done + length <= total);
        // SAFETY: `done + length` never exceeds `total`.
        let at = unsafe { local.add(done) };
        let here = libc::iovec {
            iov_base: at.cast(),
            iov_len: length,
        };
        // SAFETY: both vectors are live; local memory is valid by this function's contract, remote
        // addresses are checked by the kernel.
        let result = unsafe {
            libc::syscall(
                number,
                pid,
                &raw const here,
                1usize,
                remote.as_ptr(),
                remote.len(),
                0usize,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        if result as usize != length {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        done += length;
    }
    Ok(())
}
