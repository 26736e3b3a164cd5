//! One TCP connection as plain data: taken from a socket, and rebuilt on a fresh one in two steps.
//!
//! [`TcpState::rebuild`] does everything while the network is locked and leaves the socket under
//! repair ("built"): dropped then, it closes without a FIN or RST. [`Rebuilt::finish`] ends repair
//! and sends the rest ("resume").
//!
//! A FIN is never rebuilt as such: the end that had shut down writing does so again, after its
//! data. The other end is rebuilt as if it had not received the FIN and gets it anew. Where the
//! sender of the FIN is not rebuilt (it was closed, or is outside the job) use
//! [`inject_fin`](super::fin::inject_fin) after `finish`.
//!
//! Not restored: congestion window and round-trip estimate (they start afresh), ECN, segments
//! received out of order (the peer still has them queued and sends them again).

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::tcp_repair::{
    ConnectionState, NegotiatedOptions, Queue, REPAIR_OFF, REPAIR_OFF_NO_PROBE, Repair,
    TcpRepairError, Window, call, info, send_all,
};
use crate::socket_options::{
    BufferSizes, int, set_int, set_receive_buffer, set_send_buffer, unacknowledged, unread, unsent,
};

/// A TCP connection at the cut.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TcpState {
    /// Address of this end; IPv4-mapped for an IPv6 socket with an IPv4 connection.
    pub local: SocketAddr,
    /// Address of the other end.
    pub peer: SocketAddr,
    /// State at the cut; says which FINs were queued and received.
    pub state: ConnectionState,
    /// Sequence number after the last data byte received; a FIN is not counted.
    pub received_sequence: u32,
    /// Received and not read; ends at `received_sequence`.
    pub unread: Vec<u8>,
    /// Sequence number after the last data byte acknowledged by the peer; a FIN is not counted.
    pub acknowledged_sequence: u32,
    /// Sent and not acknowledged; begins at `acknowledged_sequence`.
    pub in_flight: Vec<u8>,
    /// Written and not sent; follows `in_flight`.
    pub unsent: Vec<u8>,
    /// `shutdown(SHUT_RD)` was called (and no FIN received).
    pub read_shutdown: bool,
    /// What the handshake had negotiated.
    pub options: NegotiatedOptions,
    /// The timestamp clock at the cut (meaningful if `options.timestamps`).
    pub timestamp: u32,
    /// The windows.
    pub window: Window,
    /// Sizes of the buffers and whether the program fixed them.
    pub buffers: BufferSizes,
    /// `SO_REUSEADDR`: repair changes it, so it is kept here.
    pub reuse_address: bool,
    /// ECN was negotiated; it will not be after a restore.
    pub ecn: bool,
}

impl TcpState {
    /// Reads a connection whose network is locked and whose holders are stopped; the socket is as
    /// before afterwards, and nothing is sent.
    ///
    /// # Errors
    /// [`TcpRepairError::State`] if it is not a connection, [`TcpRepairError::Urgent`], others.
    pub fn capture(socket: impl AsFd) -> Result<Self, TcpRepairError> {
        let socket = socket.as_fd();
        check_state(socket)?;
        let repair = Repair::begin(socket)?;
        let state = Self::read(socket, &repair)?;
        repair.end()?;
        Ok(state)
    }

    /// As [`capture`](Self::capture), but leaves the socket under repair: it can be closed (or its
    /// process killed) without a FIN or RST.
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    pub fn capture_and_silence(socket: impl AsFd) -> Result<Self, TcpRepairError> {
        let socket = socket.as_fd();
        check_state(socket)?;
        let repair = Repair::begin(socket)?;
        let state = Self::read(socket, &repair)?;
        repair.keep();
        Ok(state)
    }

    fn read(socket: BorrowedFd<'_>, repair: &Repair<'_>) -> Result<Self, TcpRepairError> {
        let events = poll(socket, libc::POLLPRI | libc::POLLRDHUP)?;
        if events & libc::POLLPRI != 0 {
            return Err(TcpRepairError::Urgent);
        }
        let info = info(socket)?;
        let fin_received = u32::from(info.state.fin_received());
        let fin_queued = u32::from(info.state.fin_queued());

        let unread = unread(socket).map_err(call("SIOCINQ"))?;
        let queued = unacknowledged(socket).map_err(call("SIOCOUTQ"))?;
        let not_sent = unsent(socket).map_err(call("SIOCOUTQNSD"))?;
        // The kernel counts a queued FIN as one byte, at the end, until it is acknowledged.
        let fin = usize::from(fin_queued == 1 && info.state != ConnectionState::FinWait2);
        let (length, unsent_length) = (queued.saturating_sub(fin), not_sent.saturating_sub(fin));
        let written_sequence = repair.sequence(Queue::Send)?.wrapping_sub(fin_queued);
        let mut in_flight = repair.peek(Queue::Send, length)?;
        let unsent = in_flight.split_off(length.saturating_sub(unsent_length));
        let received_sequence = repair.sequence(Queue::Receive)?.wrapping_sub(fin_received);

        Ok(Self {
            local: socket_name(socket, libc::getsockname).map_err(call("getsockname"))?,
            peer: socket_name(socket, libc::getpeername).map_err(call("getpeername"))?,
            state: info.state,
            received_sequence,
            unread: peek_receive_queue(socket, repair, unread)?,
            acknowledged_sequence: written_sequence.wrapping_sub(length as u32),
            in_flight,
            unsent,
            read_shutdown: events & libc::POLLRDHUP != 0 && fin_received == 0,
            options: NegotiatedOptions {
                mss: repair.mss_clamp()?,
                send_scale: if info.window_scaling {
                    info.send_scale
                } else {
                    0
                },
                receive_scale: if info.window_scaling {
                    info.receive_scale
                } else {
                    0
                },
                sack: info.sack,
                timestamps: info.timestamps,
            },
            timestamp: repair.timestamp()?,
            window: repair.window()?,
            buffers: BufferSizes::capture(socket).map_err(call("SO_SNDBUF, SO_RCVBUF"))?,
            reuse_address: repair.reuse_address(),
            ecn: info.ecn,
        })
    }

    /// Rebuilds the connection on a fresh, unconnected TCP socket of the right family, up to but
    /// not including the end of repair. The network must be locked.
    ///
    /// `peer_received` is the other end's `received_sequence` where that end belongs to the same
    /// checkpoint: what it has is left out, and all of the rest is sent at [`Rebuilt::finish`].
    /// Without it, what was in flight is rebuilt as in flight and is sent again by the kernel's
    /// retransmission timer.
    ///
    /// # Errors
    /// [`TcpRepairError`]; the socket then stays under repair, and closing it sends nothing.
    pub fn rebuild(
        &self,
        socket: OwnedFd,
        peer_received: Option<u32>,
    ) -> Result<Rebuilt, TcpRepairError> {
        if !self.state.is_connection() {
            return Err(TcpRepairError::State { state: self.state });
        }
        let skipped = self.bytes_the_peer_has(peer_received)?;
        let start = self.acknowledged_sequence.wrapping_add(skipped as u32);
        let (in_flight, after) = match peer_received {
            Some(_) => (&[][..], [&self.in_flight[skipped..], &self.unsent].concat()),
            None => (&self.in_flight[..], self.unsent.clone()),
        };

        let repair = Repair::begin(socket.as_fd())?;
        self.make_room(socket.as_fd())?;
        let unread_start = self
            .received_sequence
            .wrapping_sub(self.unread.len() as u32);
        repair.set_sequence(Queue::Receive, unread_start)?;
        repair.set_sequence(Queue::Send, start)?;
        bind(socket.as_fd(), self.local).map_err(call("bind"))?;
        connect(socket.as_fd(), self.peer).map_err(call("connect under repair"))?;
        repair.set_options(self.options)?;
        if self.options.timestamps {
            repair.set_timestamp(self.timestamp)?;
        }
        repair.fill(Queue::Receive, &self.unread)?;
        repair.fill(Queue::Send, in_flight)?;
        repair.set_window(self.window_after(skipped as u32))?;
        repair.keep();
        Ok(Rebuilt {
            socket,
            after,
            shut_down_writing: self.state.fin_queued(),
            fin_received: self.state.fin_received(),
            shut_down_reading: self.read_shutdown,
            buffers: self.buffers,
            reuse_address: self.reuse_address,
        })
    }

    /// How many bytes of `in_flight` the peer has already.
    fn bytes_the_peer_has(&self, peer_received: Option<u32>) -> Result<usize, TcpRepairError> {
        let Some(peer_received) = peer_received else {
            return Ok(0);
        };
        let skipped = peer_received.wrapping_sub(self.acknowledged_sequence) as usize;
        if skipped > self.in_flight.len() {
            return Err(TcpRepairError::Inconsistent {
                peer_received,
                acknowledged: self.acknowledged_sequence,
                in_flight: self.in_flight.len(),
            });
        }
        Ok(skipped)
    }

    /// The windows as they are once `skipped` more bytes count as acknowledged and the peer's FIN
    /// as not received: the kernel refuses windows that lie beyond what was received.
    fn window_after(&self, skipped: u32) -> Window {
        let clamp = |sequence: u32| {
            let beyond = sequence.wrapping_sub(self.received_sequence).cast_signed() > 0;
            if beyond {
                self.received_sequence
            } else {
                sequence
            }
        };
        Window {
            last_update: clamp(self.window.last_update),
            send: self.window.send.saturating_sub(skipped),
            largest: self.window.largest.max(self.window.send),
            receive: self.window.receive,
            acknowledged: clamp(self.window.acknowledged),
        }
    }

    /// Makes both buffers large enough for the queues with their overhead. Where that much is not
    /// permitted the kernel gives what is, and filling the queue says whether it was enough.
    fn make_room(&self, socket: BorrowedFd<'_>) -> Result<(), TcpRepairError> {
        let segment = self.options.mss.max(1) as usize;
        // A segment of its own for each MSS: about 1 KiB of overhead each, doubled for safety.
        let needed = |length: usize| {
            let bytes = 2 * length + (length / segment + 1) * 2048 + 64 * 1024;
            u32::try_from(bytes).unwrap_or(u32::MAX)
        };
        let tolerate = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            other => other,
        };
        let send = needed(self.in_flight.len() + self.unsent.len()).max(self.buffers.send);
        tolerate(set_send_buffer(socket, send)).map_err(call("SO_SNDBUF"))?;
        let receive = needed(self.unread.len()).max(self.buffers.receive);
        tolerate(set_receive_buffer(socket, receive)).map_err(call("SO_RCVBUF"))
    }
}

/// A connection that is built and waits, under repair, for its resume.
#[derive(Debug)]
pub struct Rebuilt {
    socket: OwnedFd,
    after: Vec<u8>,
    shut_down_writing: bool,
    fin_received: bool,
    shut_down_reading: bool,
    buffers: BufferSizes,
    reuse_address: bool,
}

impl Rebuilt {
    /// Ends repair, sends what is to be sent, shuts down what was shut down, and gives the buffers
    /// their sizes back. To be called after the network lock was lifted, before the job runs.
    ///
    /// # Errors
    /// [`TcpRepairError::DoesNotFit`] if the send buffer may not be made large enough, others.
    pub fn finish(self) -> Result<OwnedFd, TcpRepairError> {
        let socket = self.socket.as_fd();
        // The probe brings an answer that makes the peer's window known and in-flight data sent
        // again. A peer that had sent its FIN may be gone for good: it would answer with a reset.
        let mode = if self.fin_received {
            REPAIR_OFF_NO_PROBE
        } else {
            REPAIR_OFF
        };
        set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, mode).map_err(call("TCP_REPAIR"))?;
        set_int(
            socket,
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            i32::from(self.reuse_address),
        )
        .map_err(call("SO_REUSEADDR"))?;
        send_all(socket, Queue::Send, &self.after)?;
        if self.shut_down_writing {
            shutdown(socket, libc::SHUT_WR)?;
        }
        if self.shut_down_reading {
            shutdown(socket, libc::SHUT_RD)?;
        }
        self.buffers
            .restore(socket)
            .map_err(call("SO_SNDBUF, SO_RCVBUF"))?;
        Ok(self.socket)
    }
}

impl AsFd for Rebuilt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn check_state(socket: BorrowedFd<'_>) -> Result<(), TcpRepairError> {
    let state = info(socket)?.state;
    if state.is_connection() {
        Ok(())
    } else {
        Err(TcpRepairError::State { state })
    }
}

/// The data of the receive queue from where the program reads next, whatever `SO_PEEK_OFF` says
/// (tcp sockets have it since Linux 6.10).
fn peek_receive_queue(
    socket: BorrowedFd<'_>,
    repair: &Repair<'_>,
    length: usize,
) -> Result<Vec<u8>, TcpRepairError> {
    let offset = int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    let set = |offset| {
        set_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset).map_err(call("SO_PEEK_OFF"))
    };
    if offset < 0 {
        return repair.peek(Queue::Receive, length);
    }
    set(-1)?;
    let data = repair.peek(Queue::Receive, length);
    set(offset)?;
    data
}

fn poll(socket: BorrowedFd<'_>, events: i16) -> Result<i16, TcpRepairError> {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one pollfd is passed and lives through the call, which does not wait.
    let outcome = unsafe { libc::poll(&raw mut entry, 1, 0) };
    if outcome < 0 {
        return Err(call("poll")(io::Error::last_os_error()));
    }
    Ok(entry.revents)
}

fn shutdown(socket: BorrowedFd<'_>, how: i32) -> Result<(), TcpRepairError> {
    // SAFETY: shutdown(2) takes no pointers.
    let outcome = unsafe { libc::shutdown(socket.as_raw_fd(), how) };
    match (outcome, io::Error::last_os_error()) {
        (0, _) => Ok(()),
        // The peer has reset the connection meanwhile: the program will see that by itself.
        (_, error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        (_, error) => Err(call("shutdown")(error)),
    }
}

type NameCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn socket_name(socket: BorrowedFd<'_>, name: NameCall) -> io::Result<SocketAddr> {
    // SAFETY: sockaddr_storage is plain data for which zero is valid.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: getsockname(2) and getpeername(2) write at most `length` bytes to `storage`.
    let outcome = unsafe {
        name(
            socket.as_raw_fd(),
            (&raw mut storage).cast(),
            &raw mut length,
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage, which is large enough, is a sockaddr_in.
            let v4 = unsafe { *(&raw const storage).cast::<libc::sockaddr_in>() };
            let address = v4.sin_addr.s_addr.to_ne_bytes().into();
            Ok(SocketAddrV4::new(address, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that the storage, which is large enough, is a sockaddr_in6.
            let v6 = unsafe { *(&raw const storage).cast::<libc::sockaddr_in6>() };
            let (port, flow) = (u16::from_be(v6.sin6_port), v6.sin6_flowinfo);
            let address = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Ok(SocketAddrV6::new(address, port, flow, v6.sin6_scope_id).into())
        }
        _ => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
    }
}

/// Binds the socket; an IPv4 address on an IPv6 socket is to be given as mapped.
pub fn bind(socket: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    let (storage, length) = sockaddr(address);
    // SAFETY: the storage is initialised for `length` bytes and only read.
    let outcome = unsafe { libc::bind(socket.as_raw_fd(), (&raw const storage).cast(), length) };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Connects the socket; under repair this sends nothing and does not wait.
fn connect(socket: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    let (storage, length) = sockaddr(address);
    // SAFETY: the storage is initialised for `length` bytes and only read.
    let outcome = unsafe { libc::connect(socket.as_raw_fd(), (&raw const storage).cast(), length) };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The address in the kernel's form, with its length.
pub(super) fn sockaddr(address: SocketAddr) -> (libc::sockaddr_in6, libc::socklen_t) {
    // SAFETY: sockaddr_in6 is plain data for which zero is valid.
    let mut storage: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    match address {
        SocketAddr::V4(v4) => {
            let short = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_in is shorter than, and not stricter aligned than, the storage.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(short) };
            (storage, size_of::<libc::sockaddr_in>() as libc::socklen_t)
        }
        SocketAddr::V6(v6) => {
            storage.sin6_family = libc::AF_INET6 as u16;
            storage.sin6_port = v6.port().to_be();
            storage.sin6_flowinfo = v6.flowinfo();
            storage.sin6_addr.s6_addr = v6.ip().octets();
            storage.sin6_scope_id = v6.scope_id();
            (storage, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
        }
    }
}

/// Creates an unconnected TCP socket of the family of `address` in the calling thread's network
/// namespace.
///
/// # Errors
/// What socket(2) says.
pub fn tcp_socket(address: IpAddr) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
