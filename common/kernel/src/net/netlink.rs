//! A small, bounded netlink client: message builder, parser and a socket that never blocks on a reply.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::namespace::{NamespaceError, in_network_namespace};
use crate::socket_options;

/// Bytes of `struct nlmsghdr` (netlink(7)).
const MESSAGE_HEADER: usize = 16;
/// Bytes of `struct nlattr` (netlink(7)).
const ATTRIBUTE_HEADER: usize = 4;
/// Netlink attributes carry their length in 16 bits.
const ATTRIBUTE_LIMIT: usize = u16::MAX as usize;
/// Largest datagram taken from the kernel; dumps use at most 32 KiB since Linux 4.5.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// Bits of an attribute's type that are flags: `NLA_F_NESTED | NLA_F_NET_BYTEORDER`.
const ATTRIBUTE_FLAGS: u16 = 0xc000;

/// What can go wrong in a netlink conversation.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A system call on the netlink socket failed.
    #[error("netlink {operation}: {source}")]
    Socket {
        /// The call: `socket`, `bind`, `sendto`, `recvmsg` ...
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("netlink request {what} was refused: {source}")]
    Refused {
        /// The request in words.
        what: &'static str,
        /// The errno of the answer.
        #[source]
        source: io::Error,
    },
    /// A message or attribute does not fit its length field, or an answer exceeds a bound.
    #[error("netlink message too long: {what} has {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which object.
        what: &'static str,
        /// Its length in bytes (or its count).
        length: usize,
        /// The bound.
        limit: usize,
    },
    /// An answer could not be parsed.
    #[error("malformed netlink answer: {what}")]
    Malformed {
        /// What was wrong.
        what: &'static str,
    },
    /// The network namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// Several netlink messages, one behind the other, ready to be sent in one datagram.
#[derive(Debug, Default)]
pub struct Messages {
    bytes: Vec<u8>,
    overflow: Option<usize>,
}

impl Messages {
    /// An empty sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a message: type, flags and sequence number, the fixed header of its family, then
    /// the attributes that `fill` writes.
    pub fn push(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        family_header: &[u8],
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(family_header);
        pad(&mut self.bytes);
        fill(&mut Attributes {
            bytes: &mut self.bytes,
            overflow: &mut self.overflow,
        });
        match u32::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.overflow = Some(self.bytes.len() - start),
        }
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// [`NetlinkError::TooLong`] if an attribute did not fit its 16-bit length.
    pub fn finish(&self) -> Result<&[u8], NetlinkError> {
        match self.overflow {
            Some(length) => Err(NetlinkError::TooLong {
                what: "an attribute",
                length,
                limit: ATTRIBUTE_LIMIT,
            }),
            None => Ok(&self.bytes),
        }
    }

    /// Bytes gathered so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if no message was pushed.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Writes the attributes of one message.
#[derive(Debug)]
pub struct Attributes<'a> {
    bytes: &'a mut Vec<u8>,
    overflow: &'a mut Option<usize>,
}

impl Attributes<'_> {
    /// An attribute of raw bytes.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.put(kind, |attributes| attributes.bytes.extend_from_slice(value));
    }

    /// A 32-bit number in network byte order, as nf_tables wants them.
    pub fn u32_be(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// A string, NUL-terminated.
    pub fn text(&mut self, kind: u16, value: &str) {
        self.put(kind, |attributes| {
            attributes.bytes.extend_from_slice(value.as_bytes());
            attributes.bytes.push(0);
        });
    }

    /// A nested attribute, filled by `fill`.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.put(kind | libc::NLA_F_NESTED as u16, |attributes| {
            fill(attributes)
        });
    }

    fn put(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        fill(&mut Attributes {
            bytes: self.bytes,
            overflow: self.overflow,
        });
        match u16::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => *self.overflow = Some(self.bytes.len() - start),
        }
        pad(self.bytes);
    }
}

/// One message of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq` of the request it answers.
    pub sequence: u32,
    /// Everything behind the header.
    pub payload: &'a [u8],
}

/// Splits a datagram into its messages; ends after the first malformed one.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, NetlinkError>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = u32_at(rest, 0).map(|length| length as usize);
        let (Some(length), Some(header)) = (length, rest.get(..MESSAGE_HEADER)) else {
            rest = &[];
            return Some(Err(NetlinkError::Malformed {
                what: "truncated message header",
            }));
        };
        let Some(message) = rest.get(..length).filter(|_| length >= MESSAGE_HEADER) else {
            rest = &[];
            return Some(Err(NetlinkError::Malformed {
                what: "message length out of range",
            }));
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload: &message[MESSAGE_HEADER..],
        }))
    })
}

/// Splits a run of attributes into (type without flags, value); ends after a malformed one.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), NetlinkError>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some(header) = rest.get(..ATTRIBUTE_HEADER) else {
            rest = &[];
            return Some(Err(NetlinkError::Malformed {
                what: "truncated attribute header",
            }));
        };
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & !ATTRIBUTE_FLAGS;
        let Some(value) = rest.get(ATTRIBUTE_HEADER..length) else {
            rest = &[];
            return Some(Err(NetlinkError::Malformed {
                what: "attribute length out of range",
            }));
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok((kind, value)))
    })
}

/// The number in host byte order at `offset`, if it is there.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

/// A netlink socket bound to the network namespace it was opened in.
///
/// It is close-on-exec. A process that forks without exec must not leave a duplicate behind: what
/// the kernel ties to the life of the socket would then outlive its holder.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
    port: u32,
}

impl NetlinkSocket {
    /// Opens a socket of `protocol` (`NETLINK_NETFILTER`, `NETLINK_SOCK_DIAG`) in the calling
    /// thread's network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open(protocol: i32) -> Result<Self, NetlinkError> {
        let fail = |operation| move |source| NetlinkError::Socket { operation, source };
        // SAFETY: socket(2) takes no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            )
        };
        if fd < 0 {
            return Err(fail("socket")(io::Error::last_os_error()));
        }
        // SAFETY: fd was just returned by socket(2) and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_nl is plain data for which zero is valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: address is a sockaddr_nl of the length given.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
        if bound < 0 {
            return Err(fail("bind")(io::Error::last_os_error()));
        }
        // SAFETY: address and length are writable and length says the size of address.
        let named = unsafe {
            libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length)
        };
        if named < 0 {
            return Err(fail("getsockname")(io::Error::last_os_error()));
        }
        // Answers then carry only the header of the request they refuse (Linux 4.2).
        socket_options::set_int(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)
            .map_err(fail("setsockopt NETLINK_CAP_ACK"))?;
        Ok(Self {
            fd,
            port: address.nl_pid,
        })
    }

    /// Opens the socket inside the network namespace `namespace`; the caller's thread stays where
    /// it is.
    ///
    /// # Errors
    /// [`NetlinkError::Namespace`] if it cannot be entered, [`NetlinkError::Socket`] else.
    pub fn open_in(namespace: BorrowedFd<'_>, protocol: i32) -> Result<Self, NetlinkError> {
        in_network_namespace(namespace, || Self::open(protocol))?
    }

    /// The kernel's port id of this socket: unique per namespace and protocol while it is open.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends a datagram whose messages carry `NLM_F_ACK` for the `expected` sequence numbers and
    /// checks that each was acknowledged.
    ///
    /// The kernel answers inside the send call, so that nothing here waits.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] with the first refusal, others as they say.
    pub fn transact(
        &self,
        what: &'static str,
        datagram: &[u8],
        expected: std::ops::Range<u32>,
    ) -> Result<(), NetlinkError> {
        self.send(datagram)?;
        let mut outstanding = expected.len();
        let mut buffer = vec![0; RECEIVE_BUFFER];
        while let Some(length) = self.receive(&mut buffer, libc::MSG_DONTWAIT)? {
            for message in messages(&buffer[..length]) {
                let message = message?;
                if i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                match error_code(message.payload)? {
                    0 if expected.contains(&message.sequence) => {
                        outstanding = outstanding.saturating_sub(1);
                    }
                    0 => {}
                    errno => return Err(refused(what, errno)),
                }
            }
        }
        if outstanding != 0 {
            return Err(NetlinkError::Malformed {
                what: "a request was not acknowledged",
            });
        }
        Ok(())
    }

    /// Sends one dump request and hands every message of the answer to `take`.
    ///
    /// # Errors
    /// The kernel's refusal, a malformed answer, or what `take` returns.
    pub fn dump(
        &self,
        what: &'static str,
        datagram: &[u8],
        mut take: impl FnMut(Message<'_>) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        self.send(datagram)?;
        let mut buffer = vec![0; RECEIVE_BUFFER];
        loop {
            let Some(length) = self.receive(&mut buffer, 0)? else {
                return Err(NetlinkError::Malformed {
                    what: "a dump ended early",
                });
            };
            for message in messages(&buffer[..length]) {
                let message = message?;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => {
                        return match error_code(message.payload).unwrap_or(0) {
                            0 => Ok(()),
                            errno => Err(refused(what, errno)),
                        };
                    }
                    libc::NLMSG_ERROR => {
                        return Err(refused(what, error_code(message.payload)?));
                    }
                    libc::NLMSG_NOOP => {}
                    _ => take(message)?,
                }
            }
        }
    }

    fn send(&self, datagram: &[u8]) -> Result<(), NetlinkError> {
        // SAFETY: the pointer and length describe `datagram`.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                datagram.as_ptr().cast(),
                datagram.len(),
                0,
            )
        };
        match usize::try_from(sent) {
            Ok(length) if length == datagram.len() => Ok(()),
            Ok(_) => Err(NetlinkError::Malformed {
                what: "a datagram was sent in part",
            }),
            Err(_) => Err(NetlinkError::Socket {
                operation: "send",
                source: io::Error::last_os_error(),
            }),
        }
    }

    /// One datagram of the kernel's; `None` if there is none and `flags` say not to wait.
    fn receive(&self, buffer: &mut [u8], flags: i32) -> Result<Option<usize>, NetlinkError> {
        loop {
            // SAFETY: the pointer and length describe `buffer`.
            let length = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    flags | libc::MSG_TRUNC,
                )
            };
            let Ok(length) = usize::try_from(length) else {
                let source = io::Error::last_os_error();
                match source.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => return Ok(None),
                    _ => {
                        return Err(NetlinkError::Socket {
                            operation: "recv",
                            source,
                        });
                    }
                }
            };
            if length > buffer.len() {
                let limit = buffer.len();
                return Err(NetlinkError::TooLong {
                    what: "an answer",
                    length,
                    limit,
                });
            }
            return Ok(Some(length));
        }
    }
}

fn error_code(payload: &[u8]) -> Result<i32, NetlinkError> {
    let code = u32_at(payload, 0).ok_or(NetlinkError::Malformed {
        what: "short error message",
    })?;
    Ok(-(code.cast_signed()))
}

fn refused(what: &'static str, errno: i32) -> NetlinkError {
    NetlinkError::Refused {
        what,
        source: io::Error::from_raw_os_error(errno),
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_parsed() {
        let mut built = Messages::new();
        built.push(7, 1, 42, &[1, 2, 3, 4], |attributes| {
            attributes.text(1, "abc");
            attributes.nested(2, |inner| inner.u32_be(3, 0x0102_0304));
        });
        built.push(8, 0, 43, &[], |_| {});
        let bytes = built.finish().unwrap();
        let parsed: Vec<_> = messages(bytes).map(Result::unwrap).collect();
        assert_eq!(parsed.len(), 2);
        assert_eq!(
            (parsed[0].kind, parsed[0].flags, parsed[0].sequence),
            (7, 1, 42)
        );
        let fields: Vec<_> = attributes(&parsed[0].payload[4..])
            .map(Result::unwrap)
            .collect();
        assert_eq!(fields[0], (1, &b"abc\0"[..]));
        assert_eq!(fields[1].0, 2);
        let inner: Vec<_> = attributes(fields[1].1).map(Result::unwrap).collect();
        assert_eq!(inner, [(3, &[1, 2, 3, 4][..])]);
        assert_eq!(parsed[1].payload, &[] as &[u8]);
    }

    #[test]
    fn an_attribute_beyond_64_kib_is_refused() {
        let mut built = Messages::new();
        built.push(1, 0, 0, &[], |attributes| attributes.bytes(1, &[0; 65536]));
        assert!(matches!(built.finish(), Err(NetlinkError::TooLong { .. })));
    }

    #[test]
    fn malformed_answers_end_in_an_error_and_never_panic() {
        let mut built = Messages::new();
        built.push(7, 1, 42, &[1, 2, 3, 4], |attributes| {
            attributes.text(1, "abcdef")
        });
        let good = built.finish().unwrap().to_vec();
        for cut in 1..good.len() {
            assert!(
                messages(&good[..cut]).last().unwrap().is_err(),
                "cut at {cut}"
            );
        }
        for (index, value) in (0..good.len()).flat_map(|i| [(i, 0u8), (i, 0xff), (i, 0x10)]) {
            let mut bad = good.clone();
            bad[index] = value;
            for message in messages(&bad).flatten() {
                attributes(message.payload).for_each(drop);
            }
        }
        assert!(attributes(&[3, 0, 1, 0]).next().unwrap().is_err());
    }
}
