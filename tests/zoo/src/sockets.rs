//! Socket options, queue lengths and connected pairs.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use crate::descriptors::checked;

/// Sets an integer option.
///
/// # Errors
/// As setsockopt(2).
pub fn set_option(socket: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value is an integer of the length that is passed.
    checked(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length,
        )
    })
    .map(drop)
}

/// Reads an integer option.
///
/// # Errors
/// As getsockopt(2).
pub fn option(socket: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: value is an integer of the length that is passed.
    checked(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &mut length,
        )
    })?;
    Ok(value)
}

/// Bytes that can be read at once (`FIONREAD`).
///
/// # Errors
/// As ioctl(2).
pub fn unread(descriptor: impl AsFd) -> io::Result<usize> {
    let mut count = 0_i32;
    // SAFETY: FIONREAD writes one integer.
    checked(unsafe { libc::ioctl(descriptor.as_fd().as_raw_fd(), libc::FIONREAD, &mut count) })?;
    Ok(count as usize)
}

/// Bytes in the send queue that the peer has not acknowledged (`SIOCOUTQ`).
///
/// # Errors
/// As ioctl(2).
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    let mut count = 0_i32;
    // SAFETY: TIOCOUTQ (the same number as SIOCOUTQ) writes one integer.
    checked(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut count) })?;
    Ok(count as usize)
}

/// The state of a TCP socket as in `enum tcp_states` (1 established ... 8 close-wait ...).
///
/// # Errors
/// As getsockopt(2).
pub fn tcp_information(socket: impl AsFd) -> io::Result<libc::tcp_info> {
    // SAFETY: all-zero is a valid tcp_info.
    let mut information: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes of plain integers.
    checked(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut information).cast(),
            &mut length,
        )
    })?;
    Ok(information)
}

/// Two connected sockets over 127.0.0.1; the listener is closed again.
///
/// # Errors
/// As the calls it makes.
pub fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    Ok((near, far))
}
