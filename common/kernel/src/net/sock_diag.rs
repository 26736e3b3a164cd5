//! Lists of TCP and unix sockets by `NETLINK_SOCK_DIAG` (sock_diag(7), Linux 3.3).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::BorrowedFd;

use super::netlink::{Message, Messages, NetlinkError, NetlinkSocket, attributes, u32_at};
use super::tcp_repair::ConnectionState;

/// Most sockets one listing takes.
pub const SOCKET_LIMIT: usize = 1 << 20;
/// Most connections waiting at one unix listener that are taken (the kernel's own limit is
/// net.core.somaxconn).
const WAITING_LIMIT: usize = 1 << 16;

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// Bytes of `struct inet_diag_msg` and `struct unix_diag_msg`.
const INET_ANSWER: usize = 72;
const UNIX_ANSWER: usize = 16;

/// A TCP socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TcpSocket {
    /// Its state.
    pub state: ConnectionState,
    /// Its own address.
    pub local: SocketAddr,
    /// The peer's address, unspecified with port 0 for a listener.
    pub peer: SocketAddr,
    /// Inode, as in `/proc/PID/fd`; 0 for a socket that no descriptor holds (closed by its process
    /// but still finishing, or not accepted yet).
    pub inode: u32,
    /// Kernel's identity of the socket, never reused while the machine is up.
    pub cookie: u64,
    /// Interface it is bound to, 0 for none.
    pub interface: u32,
    /// Unread bytes; for a listener: connections that wait to be accepted.
    pub receive_queue: u32,
    /// Bytes not acknowledged; for a listener: its backlog limit.
    pub send_queue: u32,
    /// Owner.
    pub uid: u32,
    /// Bit 0: receiving was shut down (also by the peer's FIN), bit 1: sending.
    pub shutdown: u8,
    /// `IPV6_V6ONLY` of an IPv6 socket.
    pub v6_only: bool,
}

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// 1 connected, 7 not connected, 10 listening (the numbers of TCP).
    pub state: u8,
    /// Inode, as in `/proc/PID/fd`.
    pub inode: u32,
    /// Inode of the connected peer; 0 for a peer that was not accepted yet.
    pub peer: Option<u32>,
    /// Bound name: a path, or an abstract name that begins with NUL.
    pub name: Option<Vec<u8>>,
    /// Device (kernel form) and inode of the bound path.
    pub file: Option<(u32, u32)>,
    /// Peers that wait to be accepted at a listener.
    pub waiting: Vec<u32>,
    /// Bytes in the receive queue; for a listener: connections that wait.
    pub receive_queue: u32,
    /// Memory of the send queue in bytes; for a listener: its backlog limit.
    pub send_queue: u32,
    /// Bit 0: receiving was shut down, bit 1: sending.
    pub shutdown: u8,
}

/// All TCP sockets, IPv4 then IPv6, of a network namespace (`None`: the calling thread's).
///
/// # Errors
/// [`NetlinkError`]: what the kernel refuses, or more than [`SOCKET_LIMIT`].
pub fn tcp_sockets(namespace: Option<BorrowedFd<'_>>) -> Result<Vec<TcpSocket>, NetlinkError> {
    /// `1 << (INET_DIAG_SHUTDOWN - 1)`.
    const SHUTDOWN_WANTED: u8 = 1 << 7;
    let socket = open(namespace)?;
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // struct inet_diag_req_v2: family, protocol, extensions, pad, states, socket id.
        let mut request = [0; 56];
        request[..3].copy_from_slice(&[family as u8, libc::IPPROTO_TCP as u8, SHUTDOWN_WANTED]);
        request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        socket.dump(
            "list of TCP sockets",
            dump_request(&request).finish()?,
            |message| take(&mut sockets, parse_tcp(message)?),
        )?;
    }
    Ok(sockets)
}

/// All unix sockets of a network namespace (`None`: the calling thread's).
///
/// # Errors
/// [`NetlinkError`]: what the kernel refuses, or more than [`SOCKET_LIMIT`].
pub fn unix_sockets(namespace: Option<BorrowedFd<'_>>) -> Result<Vec<UnixSocket>, NetlinkError> {
    /// `UDIAG_SHOW_NAME | VFS | PEER | ICONS | RQLEN`.
    const SHOW: u32 = 0x1f;
    let socket = open(namespace)?;
    // struct unix_diag_req: family, protocol, pad, states, inode, show, cookie.
    let mut request = [0; 24];
    request[0] = libc::AF_UNIX as u8;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[12..16].copy_from_slice(&SHOW.to_ne_bytes());
    let mut sockets = Vec::new();
    socket.dump(
        "list of unix sockets",
        dump_request(&request).finish()?,
        |message| take(&mut sockets, parse_unix(message)?),
    )?;
    Ok(sockets)
}

fn open(namespace: Option<BorrowedFd<'_>>) -> Result<NetlinkSocket, NetlinkError> {
    match namespace {
        Some(namespace) => NetlinkSocket::open_in(namespace, libc::NETLINK_SOCK_DIAG),
        None => NetlinkSocket::open(libc::NETLINK_SOCK_DIAG),
    }
}

fn dump_request(request: &[u8]) -> Messages {
    let mut messages = Messages::new();
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    messages.push(BY_FAMILY, flags, 1, request, |_| {});
    messages
}

fn take<T>(sockets: &mut Vec<T>, socket: T) -> Result<(), NetlinkError> {
    if sockets.len() >= SOCKET_LIMIT {
        let length = sockets.len() + 1;
        return Err(NetlinkError::TooLong {
            what: "list of sockets",
            length,
            limit: SOCKET_LIMIT,
        });
    }
    sockets.push(socket);
    Ok(())
}

fn parse_tcp(message: Message<'_>) -> Result<TcpSocket, NetlinkError> {
    const SHORT: NetlinkError = NetlinkError::Malformed {
        what: "short inet_diag_msg",
    };
    // struct inet_diag_msg: family, state, timer, retransmits; socket id: ports, source,
    // destination, interface, cookie; expires, queues, uid, inode.
    let fixed: &[u8; INET_ANSWER] = message.payload.first_chunk().ok_or(SHORT)?;
    let field = |offset| u32_at(fixed, offset).ok_or(SHORT);
    let interface = field(40)?;
    let address = |port: usize, ip: usize| {
        let port = u16::from_be_bytes([fixed[port], fixed[port + 1]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&fixed[ip..ip + 16]);
        match i32::from(fixed[0]) {
            libc::AF_INET => {
                let v4 = Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]);
                Ok(SocketAddr::new(IpAddr::V4(v4), port))
            }
            libc::AF_INET6 => {
                let v6 = Ipv6Addr::from(octets);
                let scope = if v6.is_unicast_link_local() {
                    interface
                } else {
                    0
                };
                Ok(SocketAddrV6::new(v6, port, 0, scope).into())
            }
            _ => Err(NetlinkError::Malformed {
                what: "address family of a TCP socket",
            }),
        }
    };
    let mut socket = TcpSocket {
        state: ConnectionState::from_number(fixed[1]).ok_or(NetlinkError::Malformed {
            what: "state of a TCP socket",
        })?,
        local: address(4, 8)?,
        peer: address(6, 24)?,
        interface,
        cookie: u64::from(field(44)?) | u64::from(field(48)?) << 32,
        receive_queue: field(56)?,
        send_queue: field(60)?,
        uid: field(64)?,
        inode: field(68)?,
        shutdown: 0,
        v6_only: false,
    };
    for attribute in attributes(&message.payload[INET_ANSWER..]) {
        /// `INET_DIAG_SHUTDOWN` and `INET_DIAG_SKV6ONLY`.
        const SHUTDOWN: u16 = 8;
        const V6_ONLY: u16 = 11;
        match attribute? {
            (SHUTDOWN, &[bits, ..]) => socket.shutdown = bits,
            (V6_ONLY, &[only, ..]) => socket.v6_only = only != 0,
            _ => {}
        }
    }
    Ok(socket)
}

fn parse_unix(message: Message<'_>) -> Result<UnixSocket, NetlinkError> {
    const SHORT: NetlinkError = NetlinkError::Malformed {
        what: "short unix_diag_msg",
    };
    // struct unix_diag_msg: family, type, state, pad, inode, cookie.
    let fixed: &[u8; UNIX_ANSWER] = message.payload.first_chunk().ok_or(SHORT)?;
    let mut socket = UnixSocket {
        kind: i32::from(fixed[1]),
        state: fixed[2],
        inode: u32_at(fixed, 4).ok_or(SHORT)?,
        peer: None,
        name: None,
        file: None,
        waiting: Vec::new(),
        receive_queue: 0,
        send_queue: 0,
        shutdown: 0,
    };
    for attribute in attributes(&message.payload[UNIX_ANSWER..]) {
        let (kind, value) = attribute?;
        let pair = || u32_at(value, 0).zip(u32_at(value, 4)).ok_or(SHORT);
        // UNIX_DIAG_NAME, VFS, PEER, ICONS, RQLEN, SHUTDOWN.
        match kind {
            0 => socket.name = Some(value.to_vec()),
            1 => {
                let (inode, device) = pair()?;
                socket.file = Some((device, inode));
            }
            2 => socket.peer = Some(u32_at(value, 0).ok_or(SHORT)?),
            3 => {
                let (inodes, _) = value.as_chunks::<4>();
                let inodes = inodes.iter().take(WAITING_LIMIT);
                socket.waiting = inodes.map(|inode| u32::from_ne_bytes(*inode)).collect();
            }
            4 => (socket.receive_queue, socket.send_queue) = pair()?,
            6 => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::test_support::{in_fresh_network, pair};
    use std::io::Write;
    use std::net::{Shutdown, TcpListener};
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    fn inode(socket: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::metadata(path).unwrap().ino() as u32
    }

    #[test]
    fn tcp_sockets_of_a_namespace_are_listed_with_their_queues() {
        in_fresh_network(
            "tcp_sockets_of_a_namespace_are_listed_with_their_queues",
            |network| {
                for ip in [
                    IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(Ipv6Addr::LOCALHOST),
                ] {
                    let (mut one, other) = pair(ip);
                    one.write_all(b"seven..").unwrap();
                    one.shutdown(Shutdown::Write).unwrap();
                    let listener = TcpListener::bind((ip, 0)).unwrap();
                    // From another thread's view, by the descriptor of the namespace.
                    let namespace = network.as_fd();
                    let sockets = std::thread::scope(|s| {
                        s.spawn(|| tcp_sockets(Some(namespace))).join().unwrap()
                    })
                    .unwrap();
                    assert_eq!(tcp_sockets(None).unwrap().len(), sockets.len());
                    let find = |wanted| sockets.iter().find(|s| s.inode == wanted).unwrap();
                    let seen = find(inode(&other));
                    assert_eq!(seen.state, ConnectionState::CloseWait);
                    assert_eq!(seen.local, other.local_addr().unwrap());
                    assert_eq!(seen.peer, one.local_addr().unwrap());
                    assert_eq!(seen.receive_queue, 7 + 1, "seven bytes and the FIN");
                    assert_eq!(seen.shutdown, 1);
                    assert!(find(inode(&one)).state.fin_queued());
                    let seen = find(inode(&listener));
                    assert_eq!(seen.state, ConnectionState::Listen);
                    assert_eq!(seen.local, listener.local_addr().unwrap());
                }
            },
        );
    }

    #[test]
    fn unix_sockets_know_their_peer() {
        let (one, other) = UnixStream::pair().unwrap();
        (&one).write_all(b"abc").unwrap();
        let sockets = unix_sockets(None).unwrap();
        let seen = sockets
            .iter()
            .find(|socket| socket.inode == inode(&other))
            .unwrap();
        assert_eq!(seen.peer, Some(inode(&one)));
        assert_eq!((seen.kind, seen.state), (libc::SOCK_STREAM, 1));
        assert_ne!(seen.receive_queue, 0);
    }

    #[test]
    fn truncated_answers_are_errors() {
        for length in 0..INET_ANSWER {
            let payload = vec![2; length];
            let message = Message {
                kind: BY_FAMILY,
                flags: 0,
                sequence: 1,
                payload: &payload,
            };
            assert!(parse_tcp(message).is_err());
        }
        for length in 0..UNIX_ANSWER {
            let payload = vec![1; length];
            let message = Message {
                kind: BY_FAMILY,
                flags: 0,
                sequence: 1,
                payload: &payload,
            };
            assert!(parse_unix(message).is_err());
        }
    }
}
