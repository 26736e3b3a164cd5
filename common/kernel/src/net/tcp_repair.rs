//! TCP repair (Linux 3.5): typed access to the private state of one connection.
//!
//! All of it works on a descriptor of the socket that this process holds; CAP_NET_ADMIN over the
//! network namespace of the socket is needed for repair itself. The socket must not be used by a
//! running thread of the job meanwhile: reads and writes fail or miss their queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::socket_options::{self, bytes_into, int, set_bytes, set_int};

/// Why TCP state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TcpRepairError {
    /// A system call failed.
    #[error("{operation}: {source}")]
    Call {
        /// The call or option.
        operation: &'static str,
        /// What the kernel said; EPERM without CAP_NET_ADMIN.
        #[source]
        source: io::Error,
    },
    /// A connection in this state cannot be captured.
    #[error("a TCP socket in state {state:?} is not a connection that can be captured")]
    State {
        /// Its state.
        state: ConnectionState,
    },
    /// The socket holds unread urgent data, which repair cannot read.
    #[error("urgent data is pending")]
    Urgent,
    /// A queue could not be read as a whole.
    #[error("{queue:?} queue: {expected} bytes are queued, {read} could be read")]
    ShortQueue {
        /// Which queue.
        queue: Queue,
        /// Bytes that should be there.
        expected: usize,
        /// Bytes that could be read.
        read: usize,
    },
    /// The restored data exceeds the socket's buffer and the caller may not enlarge it.
    #[error("{queue:?} queue: {length} bytes do not fit, the kernel took {taken} (buffer limit)")]
    DoesNotFit {
        /// Which queue.
        queue: Queue,
        /// Bytes to be queued.
        length: usize,
        /// Bytes that were taken.
        taken: usize,
    },
    /// The two ends of a connection do not belong to the same cut.
    #[error(
        "the peer received up to sequence {peer_received}, this end has {acknowledged} \
         acknowledged and {in_flight} bytes in flight"
    )]
    Inconsistent {
        /// What the peer says it received.
        peer_received: u32,
        /// First byte of the send queue.
        acknowledged: u32,
        /// Bytes sent and not acknowledged.
        in_flight: usize,
    },
    /// The two addresses are of different families.
    #[error("local and peer address are of different families")]
    MixedFamilies,
}

/// The state of a TCP socket, with the kernel's numbers (<net/tcp_states.h>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ConnectionState {
    /// Both directions open.
    Established = 1,
    /// Waits for the answer to its SYN.
    SynSent = 2,
    /// Waits for the end of a handshake.
    SynReceived = 3,
    /// This end has shut down writing; the FIN is not acknowledged.
    FinWait1 = 4,
    /// This end has shut down writing; the FIN is acknowledged.
    FinWait2 = 5,
    /// Both ends are done; kept for late segments.
    TimeWait = 6,
    /// Not connected.
    Close = 7,
    /// The peer has shut down writing.
    CloseWait = 8,
    /// The peer, then this end shut down writing; the FIN is not acknowledged.
    LastAck = 9,
    /// Listening.
    Listen = 10,
    /// Both ends shut down writing at once; this end's FIN is not acknowledged.
    Closing = 11,
    /// A handshake that is not visible to the program yet.
    NewSynReceived = 12,
}

impl ConnectionState {
    /// The state with the kernel's number.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            12 => Self::NewSynReceived,
            _ => return None,
        })
    }

    /// True if this end has shut down writing: a FIN is queued, sent or acknowledged.
    pub fn fin_queued(self) -> bool {
        matches!(
            self,
            Self::FinWait1 | Self::FinWait2 | Self::LastAck | Self::Closing
        )
    }

    /// True if the peer's FIN was received.
    pub fn fin_received(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing)
    }

    /// True for the states that [`TcpState`](super::tcp_state::TcpState) can hold.
    pub fn is_connection(self) -> bool {
        self == Self::Established || self.fin_queued() || self.fin_received()
    }
}

/// The queue that sequence numbers and data refer to (`TCP_REPAIR_QUEUE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    /// None: data calls fail.
    None = 0,
    /// Received, not read.
    Receive = 1,
    /// Written, not acknowledged.
    Send = 2,
}

/// The windows of a connection (`TCP_REPAIR_WINDOW`, Linux 4.8), unscaled bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Sequence number of the segment that updated the send window last.
    pub last_update: u32,
    /// What the peer accepts, counted from its acknowledgement.
    pub send: u32,
    /// The largest send window seen.
    pub largest: u32,
    /// What was offered to the peer, counted from `acknowledged`.
    pub receive: u32,
    /// What was acknowledged to the peer last (`rcv_wup`).
    pub acknowledged: u32,
}

/// The part of `struct tcp_info` (tcp(7)) that a restore needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TcpInfo {
    /// `tcpi_state`.
    pub state: ConnectionState,
    /// Timestamps were negotiated.
    pub timestamps: bool,
    /// Selective acknowledgements were negotiated.
    pub sack: bool,
    /// Window scaling was negotiated.
    pub window_scaling: bool,
    /// ECN was negotiated; repair cannot restore it.
    pub ecn: bool,
    /// Shift of windows that the peer announces.
    pub send_scale: u8,
    /// Shift of windows that this end announces.
    pub receive_scale: u8,
    /// Payload of a full segment sent, in bytes.
    pub send_mss: u32,
}

/// Options to set on a connection under repair (`TCP_REPAIR_OPTIONS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NegotiatedOptions {
    /// The peer's limit on the size of segments (`mss_clamp`), bytes.
    pub mss: u32,
    /// Shift of windows that the peer announces, 0..=14.
    pub send_scale: u8,
    /// Shift of windows that this end announces, 0..=14.
    pub receive_scale: u8,
    /// Selective acknowledgements.
    pub sack: bool,
    /// Timestamps.
    pub timestamps: bool,
}

/// A socket under repair; leaving the scope ends it without sending anything and gives back
/// `SO_REUSEADDR`, which the kernel changes when repair begins and clears when it ends.
#[derive(Debug)]
pub struct Repair<'fd> {
    socket: BorrowedFd<'fd>,
    reuse_address: bool,
    leave: bool,
}

impl<'fd> Repair<'fd> {
    /// Begins repair. The socket must not be listening nor under repair already.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`]: EPERM without CAP_NET_ADMIN or on a listening socket.
    pub fn begin(socket: BorrowedFd<'fd>) -> Result<Self, TcpRepairError> {
        let reuse =
            int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR).map_err(call("SO_REUSEADDR"))?;
        set_repair(socket, REPAIR_ON)?;
        Ok(Self {
            socket,
            reuse_address: reuse == 1,
            leave: true,
        })
    }

    /// `SO_REUSEADDR` as the program had it.
    pub fn reuse_address(&self) -> bool {
        self.reuse_address
    }

    /// Leaves the socket under repair for good: when its last descriptor is closed neither FIN nor
    /// RST is sent, so that the connection can be rebuilt elsewhere.
    pub fn keep(mut self) {
        self.leave = false;
    }

    /// Ends repair and sends a window probe, which makes the peer answer with an acknowledgement.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn end_with_probe(mut self) -> Result<(), TcpRepairError> {
        self.leave = false;
        end_repair(self.socket, REPAIR_OFF, self.reuse_address)
    }

    /// Ends repair and sends nothing (Linux 4.19).
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn end(mut self) -> Result<(), TcpRepairError> {
        self.leave = false;
        end_repair(self.socket, REPAIR_OFF_NO_PROBE, self.reuse_address)
    }

    /// Next sequence number of a queue: the first not received, or the first not written.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn sequence(&self, queue: Queue) -> Result<u32, TcpRepairError> {
        self.select(queue)?;
        int(self.socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)
            .map(i32::cast_unsigned)
            .map_err(call("TCP_QUEUE_SEQ"))
    }

    /// Sets the next sequence number of a queue; only before the socket is connected.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn set_sequence(&self, queue: Queue, sequence: u32) -> Result<(), TcpRepairError> {
        self.select(queue)?;
        set_int(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_QUEUE_SEQ,
            sequence.cast_signed(),
        )
        .map_err(call("TCP_QUEUE_SEQ"))
    }

    /// Sets what the handshake had negotiated; only on an established connection that has sent
    /// nothing yet.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn set_options(&self, options: NegotiatedOptions) -> Result<(), TcpRepairError> {
        // struct tcp_repair_opt: kind of the TCP option (2 MSS, 3 window scale, 4 SACK, 8
        // timestamps) and its value, 32 bits each. Scales of zero are set as well: without them
        // the kernel keeps the scale that connect() chose.
        let scales = u32::from(options.send_scale) | u32::from(options.receive_scale) << 16;
        let mut list = vec![(2u32, options.mss), (3, scales)];
        list.extend(options.sack.then_some((4, 0)));
        list.extend(options.timestamps.then_some((8, 0)));
        let bytes: Vec<u8> = list
            .into_iter()
            .flat_map(|(kind, value)| [kind.to_ne_bytes(), value.to_ne_bytes()].concat())
            .collect();
        set_bytes(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR_OPTIONS,
            &bytes,
        )
        .map_err(call("TCP_REPAIR_OPTIONS"))
    }

    /// The peer's limit on the size of segments, in bytes (`mss_clamp`).
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn mss_clamp(&self) -> Result<u32, TcpRepairError> {
        int(self.socket, libc::IPPROTO_TCP, libc::TCP_MAXSEG)
            .map(i32::cast_unsigned)
            .map_err(call("TCP_MAXSEG"))
    }

    /// The connection's timestamp clock: an opaque number that goes on counting from where it is
    /// set (its lowest bit says microseconds since Linux 6.7).
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn timestamp(&self) -> Result<u32, TcpRepairError> {
        int(self.socket, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP)
            .map(i32::cast_unsigned)
            .map_err(call("TCP_TIMESTAMP"))
    }

    /// Sets the timestamp clock.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn set_timestamp(&self, timestamp: u32) -> Result<(), TcpRepairError> {
        set_int(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_TIMESTAMP,
            timestamp.cast_signed(),
        )
        .map_err(call("TCP_TIMESTAMP"))
    }

    /// Reads the windows.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`].
    pub fn window(&self) -> Result<Window, TcpRepairError> {
        let mut bytes = [0; 20];
        bytes_into(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR_WINDOW,
            &mut bytes,
        )
        .map_err(call("TCP_REPAIR_WINDOW"))?;
        let mut fields = [0u32; 5];
        for (field, bytes) in fields.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *field = u32::from_ne_bytes(*bytes);
        }
        let [last_update, send, largest, receive, acknowledged] = fields;
        Ok(Window {
            last_update,
            send,
            largest,
            receive,
            acknowledged,
        })
    }

    /// Sets the windows; only once the receive queue is filled.
    ///
    /// # Errors
    /// [`TcpRepairError::Call`]: EINVAL if they contradict the sequence numbers.
    pub fn set_window(&self, window: Window) -> Result<(), TcpRepairError> {
        let Window {
            last_update,
            send,
            largest,
            receive,
            acknowledged,
        } = window;
        let bytes = [last_update, send, largest, receive, acknowledged].map(u32::to_ne_bytes);
        set_bytes(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR_WINDOW,
            bytes.as_flattened(),
        )
        .map_err(call("TCP_REPAIR_WINDOW"))
    }

    /// Copies the last `length` bytes of a queue and leaves them there.
    ///
    /// # Errors
    /// [`TcpRepairError::ShortQueue`] if fewer are there, [`TcpRepairError::Call`].
    pub fn peek(&self, queue: Queue, length: usize) -> Result<Vec<u8>, TcpRepairError> {
        if length == 0 {
            return Ok(Vec::new());
        }
        self.select(queue)?;
        // A segment that was acknowledged in part stays whole in the send queue, and the kernel
        // starts with it: leave room for one of the largest.
        let room = if queue == Queue::Send {
            LARGEST_SEGMENT
        } else {
            0
        };
        let mut data = vec![0; length + room];
        // SAFETY: the pointer and length describe `data`.
        let read = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                data.as_mut_ptr().cast(),
                data.len(),
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        let read =
            usize::try_from(read).map_err(|_| call("recv MSG_PEEK")(io::Error::last_os_error()))?;
        if read < length {
            return Err(TcpRepairError::ShortQueue {
                queue,
                expected: length,
                read,
            });
        }
        data.truncate(read);
        Ok(data.split_off(read - length))
    }

    /// Appends data to a queue; nothing is sent, what goes to the send queue counts as sent.
    ///
    /// # Errors
    /// [`TcpRepairError::DoesNotFit`], [`TcpRepairError::Call`].
    pub fn fill(&self, queue: Queue, data: &[u8]) -> Result<(), TcpRepairError> {
        self.select(queue)?;
        send_all(self.socket, queue, data)
    }

    fn select(&self, queue: Queue) -> Result<(), TcpRepairError> {
        set_int(
            self.socket,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR_QUEUE,
            queue as i32,
        )
        .map_err(call("TCP_REPAIR_QUEUE"))
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        if self.leave {
            // Only a capture that failed comes here; that error is the one to be told.
            let _ = end_repair(self.socket, REPAIR_OFF_NO_PROBE, self.reuse_address);
        }
    }
}

/// Makes a sender go on at once after a lock was lifted, instead of at its next retransmission
/// timeout: repair on and off sends a window probe, and the peer's answer starts the sender.
///
/// To be called between unlocking and letting the job run. Sockets that are not established are
/// left alone.
///
/// # Errors
/// [`TcpRepairError::Call`].
pub fn kick(socket: impl AsFd) -> Result<(), TcpRepairError> {
    if info(socket.as_fd())?.state != ConnectionState::Established {
        return Ok(());
    }
    Repair::begin(socket.as_fd())?.end_with_probe()
}

/// Reads `TCP_INFO`.
///
/// # Errors
/// [`TcpRepairError::Call`].
pub fn info(socket: impl AsFd) -> Result<TcpInfo, TcpRepairError> {
    let mut bytes = [0; 20];
    let length = bytes_into(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes)
        .map_err(call("TCP_INFO"))?;
    let state = ConnectionState::from_number(bytes[0]).filter(|_| length == bytes.len());
    let state = state.ok_or_else(|| call("TCP_INFO")(io::ErrorKind::InvalidData.into()))?;
    let (options, scales) = (bytes[5], bytes[6]);
    // Two bit fields of four bits; the first is the lower one on little-endian machines.
    let (first, second) = (scales & 0xf, scales >> 4);
    let (send_scale, receive_scale) = if cfg!(target_endian = "little") {
        (first, second)
    } else {
        (second, first)
    };
    Ok(TcpInfo {
        state,
        timestamps: options & 1 != 0,
        sack: options & 2 != 0,
        window_scaling: options & 4 != 0,
        ecn: options & 8 != 0,
        send_scale,
        receive_scale,
        send_mss: u32::from_ne_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]),
    })
}

/// Sends all of `data` without waiting and without SIGPIPE.
pub(super) fn send_all(
    socket: BorrowedFd<'_>,
    queue: Queue,
    data: &[u8],
) -> Result<(), TcpRepairError> {
    let mut taken = 0;
    while taken < data.len() {
        let rest = &data[taken..data.len().min(taken + LARGEST_SEGMENT)];
        // SAFETY: the pointer and length describe `rest`, which is only read.
        let sent = unsafe {
            libc::send(
                socket.as_raw_fd(),
                rest.as_ptr().cast(),
                rest.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) if sent > 0 => taken += sent,
            Ok(_) => {
                return Err(TcpRepairError::DoesNotFit {
                    queue,
                    length: data.len(),
                    taken,
                });
            }
            Err(_) => {
                let source = io::Error::last_os_error();
                match source.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The others: the receive buffer is full (tcp_send_rcvq, tcp_rmem).
                    Some(libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS) => {
                        let length = data.len();
                        return Err(TcpRepairError::DoesNotFit {
                            queue,
                            length,
                            taken,
                        });
                    }
                    _ => return Err(call("send")(source)),
                }
            }
        }
    }
    Ok(())
}

/// More than any segment in a queue holds: 17 fragments of at most 32 KiB.
const LARGEST_SEGMENT: usize = 17 * 32 * 1024;
const REPAIR_ON: i32 = 1;
pub(super) const REPAIR_OFF: i32 = 0;
pub(super) const REPAIR_OFF_NO_PROBE: i32 = -1;

fn set_repair(socket: BorrowedFd<'_>, mode: i32) -> Result<(), TcpRepairError> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, mode).map_err(call("TCP_REPAIR"))
}

fn end_repair(
    socket: BorrowedFd<'_>,
    mode: i32,
    reuse_address: bool,
) -> Result<(), TcpRepairError> {
    set_repair(socket, mode)?;
    if reuse_address {
        socket_options::set_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
            .map_err(call("SO_REUSEADDR"))?;
    }
    Ok(())
}

pub(super) fn call(operation: &'static str) -> impl Fn(io::Error) -> TcpRepairError {
    move |source| TcpRepairError::Call { operation, source }
}
