//! The network lock: while it is held nothing is delivered to the job's sockets.
//!
//! It is an nf_tables table with `flags owner` (Linux 5.12): it belongs to one netlink socket and
//! the kernel removes it when that socket is closed. So the lock is a value; it ends with
//! [`NetworkLock::unlock`], with its drop, and with its process, also by SIGKILL. Nothing is lost:
//! a TCP sender keeps what was not acknowledged and sends it again (see
//! [`kick`](super::tcp_repair::kick) for doing so at once).
//!
//! A packet that passed the hook just before the lock may still be on its way into a socket on
//! another CPU. Delivery runs as one read-side critical section of RCU (`netif_receive_skb` to
//! `tcp_v4_rcv`), so the lock is in force once an RCU grace period has passed: `membarrier(2)`
//! with `MEMBARRIER_CMD_GLOBAL` waits for one (kernel/sched/membarrier.c, Linux 4.3: it is a
//! `synchronize_rcu()`). On kernels run with `nohz_full` that command is not offered; closing a
//! packet socket waits for a grace period as well (`packet_release` in net/packet/af_packet.c:
//! `synchronize_net()`). A grace period takes some milliseconds (measured: 8-16 ms with HZ=250), so
//! [`NetworkLock::begin`] lets the caller freeze its tree meanwhile.
//!
//! Segments that were queued on a socket because a thread was inside a call on it (the backlog)
//! are taken in when that thread leaves the call: freeze the tree, then capture.
//!
//! What is *not* stopped: packets on their way out (acknowledgements of what was received before),
//! unix sockets, and packet sockets, which see packets before the hook.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use super::netlink::{NetlinkError, NetlinkSocket};
use super::nf_tables::{Blocked, Field, Policy, TableBuilder};
use super::sock_diag::TcpSocket;
use super::tcp_repair::ConnectionState;
use crate::namespace::{Namespace, NamespaceError};

/// Most endpoints one lock takes.
pub const ENDPOINT_LIMIT: usize = 1 << 20;

/// Why the network could not be locked or unlocked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// nf_tables refused; without CAP_NET_ADMIN over the namespace: EPERM.
    #[error("network lock {table}: {source}")]
    Table {
        /// The table's name.
        table: String,
        /// What went wrong.
        #[source]
        source: NetlinkError,
    },
    /// The netlink socket could not be opened.
    #[error("network lock: {0}")]
    Socket(#[source] NetlinkError),
    /// The wait until the lock is in force on every CPU failed.
    #[error("network lock: cannot wait for all CPUs ({operation}): {source}")]
    Wait {
        /// The call.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// More endpoints than [`ENDPOINT_LIMIT`].
    #[error("network lock: {count} endpoints, at most {ENDPOINT_LIMIT} are supported")]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// A connection whose ends are of different address families.
    #[error("network lock: {local} and {peer} are of different families")]
    MixedFamilies {
        /// The job's end.
        local: SocketAddr,
        /// The other end.
        peer: SocketAddr,
    },
    /// The probe could not make a network namespace to try in.
    #[error("network lock: {0}")]
    Namespace(#[from] NamespaceError),
}

/// One TCP socket of a job in a network namespace that is not the job's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A connection; IPv4-mapped addresses are taken as IPv4.
    Connection {
        /// The job's end.
        local: SocketAddr,
        /// The other end.
        peer: SocketAddr,
    },
    /// A listening socket: everything that comes to its address and port is dropped, so that no
    /// handshake begins or ends.
    Listener {
        /// Its address, unspecified for all addresses of the namespace.
        local: SocketAddr,
        /// `IPV6_V6ONLY`: an IPv6 socket that does not take IPv4 connections.
        v6_only: bool,
    },
}

impl Endpoint {
    /// What is to be locked for a listed socket; `None` for one that is not connected. A handshake
    /// that is not finished is stopped by the lock of its listener.
    pub fn of(socket: &TcpSocket) -> Option<Self> {
        let (local, peer) = (socket.local, socket.peer);
        match socket.state {
            ConnectionState::Close | ConnectionState::NewSynReceived => None,
            ConnectionState::Listen => Some(Self::Listener {
                local,
                v6_only: socket.v6_only,
            }),
            _ => Some(Self::Connection { local, peer }),
        }
    }
}

/// What a lock stops.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Everything that is delivered in the namespace, loopback included: for a job with a network
    /// namespace of its own.
    WholeNamespace,
    /// Exactly these endpoints; nothing else on the node notices. IPv6 link-local addresses are
    /// compared without their interface.
    Endpoints(&'a [Endpoint]),
}

/// A held network lock.
#[derive(Debug)]
#[must_use = "the lock ends when it is dropped"]
pub struct NetworkLock {
    socket: NetlinkSocket,
    table: String,
    held: bool,
}

/// A lock that was set but may not be in force on every CPU yet.
#[derive(Debug)]
#[must_use = "the lock ends when it is dropped"]
pub struct PendingLock(NetworkLock);

/// What remains of a lock that was lifted: freed when dropped, which takes some milliseconds.
#[derive(Debug)]
#[must_use = "dropping it waits for the kernel: let the job run first"]
pub struct Lifted {
    _lock: NetworkLock,
}

impl NetworkLock {
    /// Locks a whole network namespace (`None`: the calling thread's) and waits until the lock is
    /// in force.
    ///
    /// # Errors
    /// [`LockError`]; nothing is locked then.
    pub fn whole_namespace(namespace: Option<BorrowedFd<'_>>) -> Result<Self, LockError> {
        Self::begin(namespace, Scope::WholeNamespace)?.wait()
    }

    /// Locks the endpoints of a job in a shared network namespace (`None`: the calling thread's)
    /// and waits until the lock is in force.
    ///
    /// # Errors
    /// [`LockError`]; nothing is locked then.
    pub fn connections(
        namespace: Option<BorrowedFd<'_>>,
        endpoints: &[Endpoint],
    ) -> Result<Self, LockError> {
        Self::begin(namespace, Scope::Endpoints(endpoints))?.wait()
    }

    /// Sets the lock; [`PendingLock::wait`] then waits until it is in force.
    ///
    /// The netlink socket is opened on a thread of its own in `namespace`; the caller's stays.
    ///
    /// # Errors
    /// [`LockError`]; nothing is locked then.
    pub fn begin(
        namespace: Option<BorrowedFd<'_>>,
        scope: Scope<'_>,
    ) -> Result<PendingLock, LockError> {
        let blocked = match scope {
            Scope::WholeNamespace => Vec::new(),
            Scope::Endpoints(endpoints) => blocked_keys(endpoints)?,
        };
        let socket = match namespace {
            Some(namespace) => NetlinkSocket::open_in(namespace, libc::NETLINK_NETFILTER),
            None => NetlinkSocket::open(libc::NETLINK_NETFILTER),
        }
        .map_err(LockError::Socket)?;
        // The port id is unique in the namespace, so that locks of several engines coexist.
        let table = format!("crcoord-{}-{}", std::process::id(), socket.port());
        let lock = Self {
            socket,
            table,
            held: true,
        };
        lock.build(scope, &blocked)
            .map_err(|source| LockError::Table {
                table: lock.table.clone(),
                source,
            })?;
        Ok(PendingLock(lock))
    }

    /// Tries both kinds of lock in a network namespace made for it, so that nobody notices.
    ///
    /// # Errors
    /// The reason why the lock cannot be had here: kernel before 5.12 or without nf_tables,
    /// missing CAP_NET_ADMIN or CAP_SYS_ADMIN.
    pub fn supported() -> Result<(), LockError> {
        let fresh = Namespace::fresh_network()?;
        let local = SocketAddr::from(([127, 0, 0, 1], 9));
        let endpoints = [Endpoint::Connection { local, peer: local }];
        drop(Self::connections(Some(fresh.as_fd()), &endpoints)?.unlock()?);
        drop(Self::whole_namespace(Some(fresh.as_fd()))?.unlock()?);
        Ok(())
    }

    /// Name of the nf_tables table, family `inet`, as `nft list tables` shows it.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Ends the lock: packets are delivered again when this returns (measured: 0.03 ms).
    ///
    /// What is given back should be dropped after the job was let run: closing the netlink socket
    /// waits until the kernel has freed the table (an RCU grace period, measured: 12-16 ms).
    ///
    /// # Errors
    /// [`LockError::Table`]; the lock ends nevertheless, as its socket is closed.
    pub fn unlock(mut self) -> Result<Lifted, LockError> {
        self.held = false;
        self.delete().map_err(|source| LockError::Table {
            table: self.table.clone(),
            source,
        })?;
        Ok(Lifted { _lock: self })
    }

    fn build(&self, scope: Scope<'_>, blocked: &[Blocked]) -> Result<(), NetlinkError> {
        let mut builder = TableBuilder::new(&self.socket, &self.table);
        builder.table();
        for (set, id) in blocked.iter().zip(1..) {
            builder.set(id, set)?;
        }
        builder.input_chain(match scope {
            Scope::WholeNamespace => Policy::Drop,
            Scope::Endpoints(_) => Policy::Accept,
        });
        for set in blocked {
            builder.drop_rule(set);
        }
        builder.commit()
    }

    fn delete(&self) -> Result<(), NetlinkError> {
        let mut builder = TableBuilder::new(&self.socket, &self.table);
        builder.delete();
        builder.commit()
    }
}

impl Drop for NetworkLock {
    fn drop(&mut self) {
        if self.held {
            // Closing the socket removes the table as well, but waits for a grace period; an
            // error here says only that this faster way did not work.
            let _ = self.delete();
        }
    }
}

impl PendingLock {
    /// Waits until every packet that passed before the lock has reached its socket.
    ///
    /// # Errors
    /// [`LockError::Wait`]; the lock is removed then.
    pub fn wait(self) -> Result<NetworkLock, LockError> {
        wait_for_grace_period()?;
        Ok(self.0)
    }
}

fn wait_for_grace_period() -> Result<(), LockError> {
    let global = libc::MEMBARRIER_CMD_GLOBAL;
    // SAFETY: membarrier(2) takes no pointers.
    let offered = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
    if offered >= 0 && offered & libc::c_long::from(global) != 0 {
        // SAFETY: membarrier(2) takes no pointers.
        let outcome = unsafe { libc::syscall(libc::SYS_membarrier, global, 0, 0) };
        return match outcome {
            0 => Ok(()),
            _ => Err(wait_failed("membarrier")),
        };
    }
    close_packet_socket()
}

/// The other way to wait for a grace period; needs CAP_NET_RAW.
fn close_packet_socket() -> Result<(), LockError> {
    // Protocol 0: it never receives a packet.
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(wait_failed("packet socket"));
    }
    // The last reference is dropped here, so that the release runs inside this call.
    // SAFETY: the descriptor was just made and is used nowhere else.
    match unsafe { libc::close(fd) } {
        0 => Ok(()),
        _ => Err(wait_failed("close of a packet socket")),
    }
}

fn wait_failed(operation: &'static str) -> LockError {
    LockError::Wait {
        operation,
        source: io::Error::last_os_error(),
    }
}

const NETWORK: i32 = libc::NFT_PAYLOAD_NETWORK_HEADER;
const TRANSPORT: i32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER;
/// Source and destination port, one behind the other.
const PORTS: Field = Field {
    base: TRANSPORT,
    offset: 0,
    length: 4,
};
const LOCAL_PORT: Field = Field {
    base: TRANSPORT,
    offset: 2,
    length: 2,
};

/// Sorts the endpoints into sets of keys as the packets that are to be dropped carry them.
fn blocked_keys(endpoints: &[Endpoint]) -> Result<Vec<Blocked>, LockError> {
    if endpoints.len() > ENDPOINT_LIMIT {
        return Err(LockError::TooMany {
            count: endpoints.len(),
        });
    }
    let (v4, v6) = (libc::NFPROTO_IPV4, libc::NFPROTO_IPV6);
    let set = |name, family, fields| Blocked {
        name,
        family,
        fields,
        keys: BTreeSet::new(),
    };
    let mut sets = [
        set(
            "connections4",
            v4,
            &[
                Field {
                    base: NETWORK,
                    offset: 12,
                    length: 8,
                },
                PORTS,
            ],
        ),
        set(
            "connections6",
            v6,
            &[
                Field {
                    base: NETWORK,
                    offset: 8,
                    length: 32,
                },
                PORTS,
            ],
        ),
        set(
            "listeners4",
            v4,
            &[
                Field {
                    base: NETWORK,
                    offset: 16,
                    length: 4,
                },
                LOCAL_PORT,
            ],
        ),
        set(
            "listeners6",
            v6,
            &[
                Field {
                    base: NETWORK,
                    offset: 24,
                    length: 16,
                },
                LOCAL_PORT,
            ],
        ),
        set("ports4", v4, &[LOCAL_PORT]),
        set("ports6", v6, &[LOCAL_PORT]),
    ];
    for endpoint in endpoints {
        match *endpoint {
            Endpoint::Connection { local, peer } => {
                // The packets to be dropped come from the peer.
                let key = match (peer.ip().to_canonical(), local.ip().to_canonical()) {
                    (IpAddr::V4(from), IpAddr::V4(to)) => {
                        (0, [from.octets(), to.octets()].concat())
                    }
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        (1, [from.octets(), to.octets()].concat())
                    }
                    _ => return Err(LockError::MixedFamilies { local, peer }),
                };
                let ports = [peer.port().to_be_bytes(), local.port().to_be_bytes()].concat();
                sets[key.0].keys.insert([key.1, ports].concat());
            }
            Endpoint::Listener { local, v6_only } => {
                let port = [local.port().to_be_bytes(), [0; 2]].concat();
                match local.ip().to_canonical() {
                    IpAddr::V4(address) if address.is_unspecified() => {
                        sets[4].keys.insert(port);
                    }
                    IpAddr::V6(address) if address.is_unspecified() => {
                        if !v6_only {
                            sets[4].keys.insert(port.clone());
                        }
                        sets[5].keys.insert(port);
                    }
                    IpAddr::V4(address) => {
                        sets[2]
                            .keys
                            .insert([address.octets().to_vec(), port].concat());
                    }
                    IpAddr::V6(address) => {
                        sets[3]
                            .keys
                            .insert([address.octets().to_vec(), port].concat());
                    }
                }
            }
        }
    }
    Ok(sets
        .into_iter()
        .filter(|set| !set.keys.is_empty())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_what_a_packet_from_the_peer_carries() {
        let local: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let peer: SocketAddr = "10.0.0.2:4660".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        let any: SocketAddr = "[::]:443".parse().unwrap();
        let sets = blocked_keys(&[
            Endpoint::Connection { local, peer },
            Endpoint::Connection {
                local: mapped,
                peer,
            },
            Endpoint::Listener {
                local: any,
                v6_only: false,
            },
        ])
        .unwrap();
        let names: Vec<_> = sets.iter().map(|set| (set.name, set.keys.len())).collect();
        assert_eq!(names, [("connections4", 1), ("ports4", 1), ("ports6", 1)]);
        assert!(
            sets[0]
                .keys
                .contains(&vec![10, 0, 0, 2, 10, 0, 0, 1, 0x12, 0x34, 0, 80])
        );
        assert!(sets[1].keys.contains(&vec![1, 187, 0, 0]));
        for set in &sets {
            let length: u32 = set
                .fields
                .iter()
                .map(|f| f.length.next_multiple_of(4))
                .sum();
            assert!(
                set.keys.iter().all(|key| key.len() == length as usize),
                "{set:?}"
            );
        }
    }

    #[test]
    fn mixed_families_are_refused() {
        let local = "10.0.0.1:80".parse().unwrap();
        let peer = "[fe80::1]:80".parse().unwrap();
        let outcome = blocked_keys(&[Endpoint::Connection { local, peer }]);
        assert!(matches!(outcome, Err(LockError::MixedFamilies { .. })));
    }

    #[test]
    fn both_ways_to_wait_for_all_cpus_work_here() {
        wait_for_grace_period().unwrap();
        close_packet_socket().expect(
            "both_ways_to_wait_for_all_cpus_work_here needs CAP_NET_RAW for packet sockets",
        );
    }
}
