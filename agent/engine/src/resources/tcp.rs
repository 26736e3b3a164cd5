//! TCP sockets: fresh, bound, listening, and connections with the data in both queues.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_common::wire::member::TcpEnd;
use crcoord_kernel::namespace::{Namespace, NamespaceKind};
use crcoord_kernel::net::fin::inject_fin;
use crcoord_kernel::net::lock::Endpoint;
use crcoord_kernel::net::sock_diag::{TcpSocket, tcp_sockets};
use crcoord_kernel::net::tcp_repair::{ConnectionState, NegotiatedOptions, Window};
use crcoord_kernel::net::tcp_state::{Rebuilt, TcpState, bind, tcp_socket};
use crcoord_kernel::objects;
use crcoord_kernel::socket_options::{
    BufferSizes, SavedOption, SocketOptions, int, set_bytes, set_int,
};
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext};
use crate::error::{Result, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "tcp",
    object: ObjectKind::Tcp,
    recognise: is_tcp,
    check,
    capture,
    open,
    finish: None,
};

const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const SO_LINGER: i32 = 13;
const SO_PROTOCOL: i32 = 38;
const IPPROTO_TCP: i32 = 6;
const O_NONBLOCK: u32 = 0o4000;

/// A TCP socket of any state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TcpImage {
    object: ObjectId,
    flags: u32,
    options: Vec<(i32, i32, serde_bytes::ByteBuf)>,
    v6: bool,
    state: State,
}

impl ImageRecord for TcpImage {
    const KIND: &'static str = "tcp";
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Neither connected nor listening.
    Unconnected { local: SocketAddr },
    /// Listening with this backlog.
    Listening { local: SocketAddr, backlog: u32 },
    /// A connection inside the job.
    Connection(Box<ConnectionImage>),
    /// A connection to a peer outside the job, which finds it reset at restart.
    Reset,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ConnectionImage {
    local: SocketAddr,
    peer: SocketAddr,
    state: u8,
    received_sequence: u32,
    #[serde(with = "serde_bytes")]
    unread: Vec<u8>,
    acknowledged_sequence: u32,
    #[serde(with = "serde_bytes")]
    in_flight: Vec<u8>,
    #[serde(with = "serde_bytes")]
    unsent: Vec<u8>,
    read_shutdown: bool,
    mss: u32,
    scales: (u8, u8),
    sack: bool,
    timestamps: bool,
    timestamp: u32,
    /// last_update, send, largest, receive, acknowledged
    window: [u32; 5],
    /// send, receive, and which of them the program fixed (`SO_BUF_LOCK`)
    buffers: (u32, u32, u32),
    reuse_address: bool,
}

fn is_tcp(context: &CaptureContext<'_>, description: &Description) -> bool {
    if !description.name.starts_with("socket:[") {
        return false;
    }
    let Ok(socket) = context.duplicate(description) else {
        return false;
    };
    int(&socket, SOL_SOCKET, SO_PROTOCOL).is_ok_and(|protocol| protocol == IPPROTO_TCP)
        && int(&socket, SOL_SOCKET, SO_DOMAIN).is_ok_and(|domain| matches!(domain, 2 | 10))
}

const SO_DOMAIN: i32 = 39;

/// The sockets of the tree with what the kernel tells of each.
fn sockets(pid: i32, all: &[&Description]) -> Result<Vec<(ObjectId, TcpSocket)>> {
    let failed = |error: &dyn std::error::Error| -> Report {
        obstacle(
            "engine-sock-diag",
            format!("the kernel does not list TCP sockets: {error}"),
        )
        .remedy("load tcp_diag (CONFIG_INET_DIAG)")
    };
    let namespace =
        Namespace::of_process(pid, NamespaceKind::Network).map_err(|error| failed(&error))?;
    let listed = tcp_sockets(Some(namespace.as_fd())).map_err(|error| failed(&error))?;
    Ok(all
        .iter()
        .filter_map(|description| {
            let socket = listed
                .iter()
                .find(|socket| u64::from(socket.inode) == description.inode)?;
            Some((description.object, socket.clone()))
        })
        .collect())
}

/// What a network lock must stop for sockets in a network that is not the tree's own.
pub fn endpoints(pid: i32, descriptions: &[Description]) -> Result<Vec<Endpoint>> {
    let all: Vec<&Description> = descriptions
        .iter()
        .filter(|description| description.name.starts_with("socket:["))
        .collect();
    if all.is_empty() {
        return Ok(Vec::new());
    }
    Ok(sockets(pid, &all)?
        .into_iter()
        .map(|(_, socket)| match socket.state {
            ConnectionState::Listen => Endpoint::Listener {
                local: socket.local,
                v6_only: socket.v6_only,
            },
            _ => Endpoint::Connection {
                local: socket.local,
                peer: socket.peer,
            },
        })
        .collect())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// True when the other end is in the tree or on another member of the job.
fn is_inside(context: &CaptureContext<'_>, all: &[(ObjectId, TcpSocket)], one: &TcpSocket) -> bool {
    let (local, peer) = (canonical(one.local), canonical(one.peer));
    context
        .target
        .options
        .members
        .iter()
        .any(|member| member.to_canonical() == peer.ip())
        || all
            .iter()
            .any(|(_, other)| canonical(other.local) == peer && canonical(other.peer) == local)
}

fn check(context: &CaptureContext<'_>, all: &[&Description]) -> Vec<Report> {
    let known = match sockets(all[0].pid, all) {
        Ok(known) => known,
        Err(error) => return error.0,
    };
    let mut reports = Vec::new();
    for description in all {
        let Some((_, socket)) = known
            .iter()
            .find(|(object, _)| *object == description.object)
        else {
            continue;
        };
        let at = |report: Report| {
            description
                .at(report)
                .address(format!("{} - {}", socket.local, socket.peer))
        };
        if socket.state == ConnectionState::SynSent {
            reports.push(at(obstacle(
                "engine-tcp-connecting",
                "a connection is being made",
            )
            .remedy("try again in a moment")));
        } else if socket.state.is_connection()
            && !context.target.options.reset_external_tcp
            && !is_inside(context, &known, socket)
        {
            reports.push(at(obstacle(
                "engine-tcp-external",
                "a connection leads to a process outside the job",
            )
            .remedy("close it, or accept its loss with --external-tcp reset")));
        }
    }
    reports
}

fn capture(context: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    let obstacles = check(context, all);
    if !obstacles.is_empty() {
        return Err(crate::EngineError(obstacles));
    }
    let known = sockets(all[0].pid, all)?;
    let mut records = Vec::new();
    for description in all {
        let fd = context.duplicate(description)?;
        let failed = |error: std::io::Error| description.at(failure("reading a socket", &error));
        let options = SocketOptions::capture(&fd).map_err(failed)?;
        let listed = known
            .iter()
            .find(|(object, _)| *object == description.object);
        let state = match listed.map(|(_, socket)| socket) {
            Some(socket) if socket.state == ConnectionState::Listen => Listener {
                socket,
                connections_reset: context.target.options.reset_external_tcp,
            }
            .capture()
            .map_err(|report| description.at(report))?,
            Some(socket) if socket.state.is_connection() => {
                if is_inside(context, &known, socket) {
                    let state = TcpState::capture(&fd).map_err(|error| {
                        description.at(obstacle("engine-tcp", error.to_string()))
                    })?;
                    context.connections.push(TcpEnd {
                        local: canonical(state.local),
                        peer: canonical(state.peer),
                        received: state.received_sequence,
                    });
                    let image = State::Connection(Box::new(ConnectionImage::of(&state)));
                    context.sockets.push(fd.try_clone().map_err(failed)?);
                    image
                } else {
                    State::Reset
                }
            }
            _ => State::Unconnected {
                local: local_address(&fd).map_err(failed)?,
            },
        };
        let v6 = int(&fd, SOL_SOCKET, SO_DOMAIN).map_err(failed)? == 10;
        records.push(Record::encode(&TcpImage {
            object: description.object,
            flags: description.flags(),
            options: options
                .saved
                .into_iter()
                .map(|option| (option.level, option.name, option.value.into()))
                .collect(),
            v6,
            state,
        }));
    }
    Ok(records)
}

/// The ends of the connections in an image, for a tree that is all of its job.
pub fn ends(records: &[Record]) -> Vec<TcpEnd> {
    records
        .iter()
        .filter(|record| record.is::<TcpImage>())
        // What does not decode is refused, by name, when it is opened.
        .filter_map(|record| record.decode::<TcpImage>().ok())
        .filter_map(|image| match image.state {
            State::Connection(connection) => Some(TcpEnd {
                local: canonical(connection.local),
                peer: canonical(connection.peer),
                received: connection.received_sequence,
            }),
            _ => None,
        })
        .collect()
}

struct Listener<'a> {
    socket: &'a TcpSocket,
    connections_reset: bool,
}

impl Listener<'_> {
    fn capture(&self) -> std::result::Result<State, Report> {
        if self.socket.receive_queue > 0 && !self.connections_reset {
            return Err(obstacle(
                "engine-tcp-not-accepted",
                format!(
                    "{} connections wait to be accepted",
                    self.socket.receive_queue
                ),
            )
            .remedy("try again in a moment, or accept their loss with --external-tcp reset"));
        }
        Ok(State::Listening {
            local: self.socket.local,
            backlog: self.socket.send_queue,
        })
    }
}

fn local_address(fd: &OwnedFd) -> std::io::Result<SocketAddr> {
    TcpStream::from(fd.try_clone()?).local_addr()
}

impl ConnectionImage {
    fn of(state: &TcpState) -> Self {
        let TcpState {
            window,
            options,
            buffers,
            ..
        } = state.clone();
        ConnectionImage {
            local: state.local,
            peer: state.peer,
            state: state.state as u8,
            received_sequence: state.received_sequence,
            unread: state.unread.clone(),
            acknowledged_sequence: state.acknowledged_sequence,
            in_flight: state.in_flight.clone(),
            unsent: state.unsent.clone(),
            read_shutdown: state.read_shutdown,
            mss: options.mss,
            scales: (options.send_scale, options.receive_scale),
            sack: options.sack,
            timestamps: options.timestamps,
            timestamp: state.timestamp,
            window: [
                window.last_update,
                window.send,
                window.largest,
                window.receive,
                window.acknowledged,
            ],
            buffers: (buffers.send, buffers.receive, buffers.locked),
            reuse_address: state.reuse_address,
        }
    }

    fn state(&self) -> Result<TcpState> {
        let [last_update, send, largest, receive, acknowledged] = self.window;
        let (send_buffer, receive_buffer, locked) = self.buffers;
        Ok(TcpState {
            local: self.local,
            peer: self.peer,
            state: ConnectionState::from_number(self.state).ok_or_else(|| {
                crate::error::bad_image(format!("a connection in state {}", self.state))
            })?,
            received_sequence: self.received_sequence,
            unread: self.unread.clone(),
            acknowledged_sequence: self.acknowledged_sequence,
            in_flight: self.in_flight.clone(),
            unsent: self.unsent.clone(),
            read_shutdown: self.read_shutdown,
            options: NegotiatedOptions {
                mss: self.mss,
                send_scale: self.scales.0,
                receive_scale: self.scales.1,
                sack: self.sack,
                timestamps: self.timestamps,
            },
            timestamp: self.timestamp,
            window: Window {
                last_update,
                send,
                largest,
                receive,
                acknowledged,
            },
            buffers: BufferSizes {
                send: send_buffer,
                receive: receive_buffer,
                locked,
            },
            reuse_address: self.reuse_address,
            ecn: false,
        })
    }
}

/// A connection that is built and waits for the resume.
#[derive(Debug)]
pub struct WaitingConnection {
    rebuilt: Rebuilt,
    /// Set when the peer had closed its end and is not rebuilt: it cannot send its FIN again.
    lost_fin: Option<TcpState>,
}

impl WaitingConnection {
    /// Ends repair and sends what is left to be sent; the network lock is lifted.
    pub fn finish(self) -> Result<()> {
        let failed = |error: &dyn std::error::Error| -> Report {
            Report::new(
                "engine-tcp-resume",
                crcoord_common::report::Class::Failure,
                format!("a connection cannot be resumed: {error}"),
            )
        };
        self.rebuilt.finish().map_err(|error| failed(&error))?;
        if let Some(state) = self.lost_fin {
            inject_fin(&state).map_err(|error| failed(&error))?;
        }
        Ok(())
    }
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    let images: Vec<TcpImage> = records
        .iter()
        .map(|record| record.decode())
        .collect::<std::result::Result<_, _>>()?;
    // Resets are made by real connections over loopback, which the lock would stop.
    for image in images.iter().filter(|image| image.state == State::Reset) {
        let socket = reset_socket(image.v6).map_err(|error| failure("making a reset", &error))?;
        image.keep(context, socket)?;
    }
    context.lock_network()?;
    for image in &images {
        let socket = match &image.state {
            State::Reset => continue,
            State::Unconnected { local } => image.bound(context, *local)?,
            State::Listening { local, backlog } => {
                let socket = image.bound(context, *local)?;
                objects::listen(&socket, *backlog)
                    .map_err(|error| failure("listen", &error).address(local.to_string()))?;
                socket
            }
            State::Connection(connection) => image.connected(context, connection)?,
        };
        image.keep(context, socket)?;
    }
    Ok(())
}

impl TcpImage {
    fn keep(&self, context: &mut RestoreContext<'_>, socket: OwnedFd) -> Result<()> {
        objects::set_status_flags(&socket, self.flags & O_NONBLOCK)
            .map_err(|error| failure("F_SETFL", &error))?;
        context.keep(self.object, socket)
    }

    fn socket(&self) -> Result<OwnedFd> {
        let family = if self.v6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        let socket = tcp_socket(family).map_err(|error| failure("socket", &error))?;
        let options = SocketOptions {
            saved: self
                .options
                .iter()
                .map(|(level, name, value)| SavedOption {
                    level: *level,
                    name: *name,
                    value: value.to_vec(),
                })
                .collect(),
        };
        options
            .restore(&socket)
            .map_err(|error| failure("setting socket options", &error))?;
        Ok(socket)
    }

    fn bound(&self, context: &RestoreContext<'_>, local: SocketAddr) -> Result<OwnedFd> {
        let socket = self.socket()?;
        if local.port() == 0 {
            return Ok(socket);
        }
        let local = context.mapped(local);
        // The port may still be in use by connections that the job had and that are rebuilt.
        let reuse = int(&socket, SOL_SOCKET, SO_REUSEADDR)
            .map_err(|error| failure("SO_REUSEADDR", &error))?;
        set_int(&socket, SOL_SOCKET, SO_REUSEADDR, 1)
            .map_err(|error| failure("SO_REUSEADDR", &error))?;
        bind(socket.as_fd(), local).map_err(|error| {
            obstacle(
                "engine-address-in-use",
                format!("the address cannot be used: {error}"),
            )
            .address(local.to_string())
            .errno(error.raw_os_error())
            .remedy("free the port on this node, or restart on another one")
        })?;
        set_int(&socket, SOL_SOCKET, SO_REUSEADDR, reuse)
            .map_err(|error| failure("SO_REUSEADDR", &error))?;
        Ok(socket)
    }

    fn connected(
        &self,
        context: &mut RestoreContext<'_>,
        connection: &ConnectionImage,
    ) -> Result<OwnedFd> {
        let mut state = connection.state()?;
        let (local, peer) = (canonical(state.local), canonical(state.peer));
        let other = context
            .target
            .connections
            .iter()
            .find(|end| end.local == peer && end.peer == local);
        let peer_received = other.map(|end| end.received);
        let peer_is_rebuilt = other.is_some();
        state.local = context.mapped(state.local);
        state.peer = context.mapped(state.peer);
        let socket = self.socket()?;
        let kept = socket.try_clone().map_err(|error| failure("dup", &error))?;
        let rebuilt = state.rebuild(socket, peer_received).map_err(|error| {
            obstacle(
                "engine-tcp-rebuild",
                format!("a connection cannot be rebuilt: {error}"),
            )
            .address(format!("{} - {}", state.local, state.peer))
            .remedy("free the address on this node, or restart on another one")
        })?;
        let lost_fin = (state.state.fin_received() && !peer_is_rebuilt).then_some(state);
        context
            .connections
            .push(WaitingConnection { rebuilt, lost_fin });
        Ok(kept)
    }
}

/// A socket whose connection was reset by its peer, as its program finds it.
fn reset_socket(v6: bool) -> std::io::Result<OwnedFd> {
    let loopback: IpAddr = if v6 {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    let listener = TcpListener::bind((loopback, 0))?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    let (theirs, _) = listener.accept()?;
    // struct linger { on, 0 seconds }: closing resets.
    set_bytes(&theirs, SOL_SOCKET, SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])?;
    drop(theirs);
    Ok(ours.into())
}
