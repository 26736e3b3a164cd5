//! Typed access to the options of a socket that this process holds (its own, or a duplicate of a
//! job's taken with pidfd_getfd(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `SO_BUF_LOCK` (Linux 5.13): which buffer sizes were set by hand and are not tuned any more.
pub const SO_BUF_LOCK: i32 = 72;
/// Bit of [`SO_BUF_LOCK`]: the send buffer's size is fixed.
pub const SEND_BUFFER_LOCKED: i32 = 1;
/// Bit of [`SO_BUF_LOCK`]: the receive buffer's size is fixed.
pub const RECEIVE_BUFFER_LOCKED: i32 = 2;
/// Longest option value that [`SocketOptions::capture`] takes, in bytes.
const LONGEST_VALUE: usize = 64;

/// Reads an option that is one C `int` (getsockopt(2)).
///
/// # Errors
/// What the kernel says; `InvalidData` if the value has another size.
pub fn int(socket: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    match bytes_into(socket, level, name, &mut value)? {
        // IP_TOS and friends answer with one byte when it suffices and the caller's buffer is
        // shorter than an int only; a full int is the rule.
        4 => Ok(i32::from_ne_bytes(value)),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("socket option {level}/{name} has {other} bytes, 4 were expected"),
        )),
    }
}

/// Sets an option that is one C `int` (setsockopt(2)).
///
/// # Errors
/// What the kernel says.
pub fn set_int(socket: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_bytes(socket, level, name, &value.to_ne_bytes())
}

/// Reads an option of any form, at most `limit` bytes of it.
///
/// # Errors
/// What the kernel says.
pub fn bytes(socket: impl AsFd, level: i32, name: i32, limit: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; limit];
    let length = bytes_into(socket, level, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

/// Reads an option into `value`; the kernel may read `value` first (as `TCP_REPAIR_WINDOW` does
/// not, but some do). Returns the length of the answer in bytes.
///
/// # Errors
/// What the kernel says.
pub fn bytes_into(socket: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the pointer and `length` describe `value`; the kernel writes at most that much.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((length as usize).min(value.len()))
}

/// Sets an option of any form.
///
/// # Errors
/// What the kernel says.
pub fn set_bytes(socket: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the pointer and `length` describe `value`, which is only read.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Bytes in the receive queue that were not read yet (`SIOCINQ`, tcp(7)); a FIN is not counted.
///
/// # Errors
/// What the kernel says; EINVAL for a listening socket.
pub fn unread(socket: impl AsFd) -> io::Result<usize> {
    queue_length(socket, libc::FIONREAD)
}

/// Bytes in the send queue that were not acknowledged yet (`SIOCOUTQ`, tcp(7)); a FIN counts as one.
///
/// # Errors
/// What the kernel says; EINVAL for a listening socket.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    queue_length(socket, libc::TIOCOUTQ)
}

/// Bytes in the send queue that were not sent yet (`SIOCOUTQNSD`, Linux 2.6.39); a FIN counts as one.
///
/// # Errors
/// What the kernel says; EINVAL for a listening socket.
pub fn unsent(socket: impl AsFd) -> io::Result<usize> {
    const SIOCOUTQNSD: libc::Ioctl = 0x894B;
    queue_length(socket, SIOCOUTQNSD)
}

fn queue_length(socket: impl AsFd, request: libc::Ioctl) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    // SAFETY: the three requests above write one int at the pointer given.
    let outcome = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut value) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Sizes of a socket's buffers, as the kernel keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferSizes {
    /// `SO_SNDBUF` as read: bytes with overhead, twice what a program asked for.
    pub send: u32,
    /// `SO_RCVBUF` as read: bytes with overhead, twice what a program asked for.
    pub receive: u32,
    /// [`SO_BUF_LOCK`]: which of the two the program fixed.
    pub locked: u32,
}

impl BufferSizes {
    /// Reads the sizes and the locks.
    ///
    /// # Errors
    /// What the kernel says; ENOPROTOOPT before Linux 5.13.
    pub fn capture(socket: impl AsFd) -> io::Result<Self> {
        let read = |name| int(socket.as_fd(), libc::SOL_SOCKET, name).map(i32::cast_unsigned);
        Ok(Self {
            send: read(libc::SO_SNDBUF)?,
            receive: read(libc::SO_RCVBUF)?,
            locked: read(SO_BUF_LOCK)?,
        })
    }

    /// Sets the sizes and the locks; smaller than the queued data is allowed.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::PermissionDenied`] if the program had fixed a size
    /// beyond what the caller may set (`net.core.wmem_max`, `rmem_max`). A size that the kernel
    /// had tuned is set as far as permitted: the kernel goes on tuning it.
    pub fn restore(self, socket: impl AsFd) -> io::Result<()> {
        let fixed = |bit: i32| self.locked & bit.cast_unsigned() != 0;
        let tolerate = |outcome: io::Result<()>, fixed: bool| match outcome {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !fixed => Ok(()),
            other => other,
        };
        tolerate(
            set_send_buffer(socket.as_fd(), self.send),
            fixed(SEND_BUFFER_LOCKED),
        )?;
        tolerate(
            set_receive_buffer(socket.as_fd(), self.receive),
            fixed(RECEIVE_BUFFER_LOCKED),
        )?;
        // Setting a size locks it: put back what the program had.
        set_int(
            socket,
            libc::SOL_SOCKET,
            SO_BUF_LOCK,
            self.locked.cast_signed(),
        )
    }
}

/// Sets the send buffer to `size` (as `SO_SNDBUF` reads it), by `SO_SNDBUFFORCE` where permitted.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] if only a smaller size was permitted.
pub fn set_send_buffer(socket: impl AsFd, size: u32) -> io::Result<()> {
    set_buffer(
        socket,
        libc::SO_SNDBUFFORCE,
        libc::SO_SNDBUF,
        "net.core.wmem_max",
        size,
    )
}

/// Sets the receive buffer to `size` (as `SO_RCVBUF` reads it), by `SO_RCVBUFFORCE` where permitted.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] if only a smaller size was permitted.
pub fn set_receive_buffer(socket: impl AsFd, size: u32) -> io::Result<()> {
    set_buffer(
        socket,
        libc::SO_RCVBUFFORCE,
        libc::SO_RCVBUF,
        "net.core.rmem_max",
        size,
    )
}

fn set_buffer(
    socket: impl AsFd,
    force: i32,
    plain: i32,
    limit: &'static str,
    size: u32,
) -> io::Result<()> {
    // The kernel doubles what it is given (socket(7)).
    let asked = i32::try_from(size.div_ceil(2)).unwrap_or(i32::MAX);
    match set_int(socket.as_fd(), libc::SOL_SOCKET, force, asked) {
        Ok(()) => return Ok(()),
        // Needs CAP_NET_ADMIN in the initial user namespace.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        Err(error) => return Err(error),
    }
    set_int(socket.as_fd(), libc::SOL_SOCKET, plain, asked)?;
    let got = int(socket, libc::SOL_SOCKET, plain)?.cast_unsigned();
    if got < size {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("socket buffer of {size} bytes needed, {got} permitted by {limit}"),
        ));
    }
    Ok(())
}

/// One option and its value as the kernel gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SavedOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP` ...
    pub level: i32,
    /// The option's number.
    pub name: i32,
    /// The value, byte for byte, in host order.
    pub value: Vec<u8>,
}

/// The ordinary options of a socket: all that getsockopt(2) gives back in the form that
/// setsockopt(2) takes. Buffer sizes ([`BufferSizes`]) and TCP's connection state are kept apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct SocketOptions {
    /// In the order in which they are to be set.
    pub saved: Vec<SavedOption>,
}

impl SocketOptions {
    /// Reads every option of the table that this kind of socket has.
    ///
    /// `SO_REUSEADDR` is wrong (2) while TCP repair is on: capture first.
    ///
    /// # Errors
    /// What the kernel says, other than that it has no such option.
    pub fn capture(socket: impl AsFd) -> io::Result<Self> {
        let domain = int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        let protocol = int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        let mut saved = Vec::new();
        let tables = [
            (true, GENERAL),
            (domain == libc::AF_INET || domain == libc::AF_INET6, IPV4),
            (domain == libc::AF_INET6, IPV6),
            (protocol == libc::IPPROTO_TCP, TCP),
        ];
        for &(level, name) in tables
            .iter()
            .filter(|table| table.0)
            .flat_map(|table| table.1)
        {
            match bytes(socket.as_fd(), level, name, LONGEST_VALUE) {
                Ok(value) => saved.push(SavedOption { level, name, value }),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { saved })
    }

    /// Sets every saved option whose value differs on this socket.
    ///
    /// # Errors
    /// What the kernel says, with the option's numbers.
    pub fn restore(&self, socket: impl AsFd) -> io::Result<()> {
        for SavedOption { level, name, value } in &self.saved {
            let present = bytes(socket.as_fd(), *level, *name, LONGEST_VALUE);
            if present.is_ok_and(|present| present == *value) {
                continue;
            }
            set_bytes(socket.as_fd(), *level, *name, value).map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("socket option {level}/{name}: {error}"),
                )
            })?;
        }
        Ok(())
    }

    /// The saved value of an option that is one C `int`.
    pub fn int(&self, level: i32, name: i32) -> Option<i32> {
        let option = self
            .saved
            .iter()
            .find(|option| (option.level, option.name) == (level, name))?;
        Some(i32::from_ne_bytes(option.value.as_slice().try_into().ok()?))
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTCONN)
    )
}

const GENERAL: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_PEEK_OFF),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_INCOMING_CPU),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (libc::SOL_SOCKET, libc::SO_ZEROCOPY),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
];

const IPV4: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
];

const IPV6: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
];

const TCP: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_INQ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn options_of_a_tcp_socket_survive_a_round_trip() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        one.set_nodelay(true).unwrap();
        one.set_read_timeout(Some(std::time::Duration::from_millis(1500)))
            .unwrap();
        set_int(&one, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1).unwrap();
        set_int(&one, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77).unwrap();
        set_bytes(&one, libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").unwrap();
        set_int(&one, libc::IPPROTO_IP, libc::IP_TOS, 8).unwrap();
        let saved = SocketOptions::capture(&one).unwrap();
        assert_eq!(saved.int(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE), Some(77));

        let two = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_ne!(SocketOptions::capture(&two).unwrap(), saved);
        saved.restore(&two).unwrap();
        assert_eq!(SocketOptions::capture(&two).unwrap(), saved);
    }

    #[test]
    fn buffer_sizes_and_their_locks_survive_a_round_trip() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let free = BufferSizes::capture(&one).unwrap();
        assert_eq!(free.locked, 0);
        set_int(&one, libc::SOL_SOCKET, libc::SO_RCVBUF, 30000).unwrap();
        let fixed = BufferSizes::capture(&one).unwrap();
        assert_eq!(
            (fixed.receive, fixed.locked),
            (60000, RECEIVE_BUFFER_LOCKED.cast_unsigned())
        );
        let two = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        fixed.restore(&two).unwrap();
        assert_eq!(BufferSizes::capture(&two).unwrap(), fixed);
        free.restore(&two).unwrap();
        assert_eq!(BufferSizes::capture(&two).unwrap(), free);
    }
}
