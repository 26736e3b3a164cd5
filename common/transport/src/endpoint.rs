//! `Endpoint`: one UDP socket that is server and client at once, with mutual TLS.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crcoord_common::report::{Class, Report};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{EndpointConfig, ServerConfig, TokioRuntime, VarInt};
use rustix::net::sockopt;
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;

use crate::admission;
use crate::connect::{self, ConnectError};
use crate::connection::{CLOSE_SHUTDOWN, Connection};
use crate::identity::{Identity, provider};
use crate::limits::{InvalidLimit, Limits};
use crate::peer::Peer;
use crate::verify::ClientCheck;

/// Name and major version of the protocol in the TLS handshake.
pub(crate) const ALPN: &[u8] = b"crcoord/1";
/// The name TLS asks for; never sent, never compared (`verify::ServerCheck` knows whom to expect).
pub(crate) const SERVER_NAME: &str = "crcoord.invalid";
/// What a server sends on a stream of its own once it has admitted a client.
pub(crate) const WELCOME: &[u8] = &[1];

/// Admitted connections that may wait for `accept`.
const ACCEPT_QUEUE: usize = 64;

/// Packets held per connection attempt that is not yet looked at, and by all together, in bytes. A
/// first flight with our certificates is below 8 KiB.
const UNSEEN_BUFFER: u64 = 16 << 10;
const UNSEEN_BUFFER_TOTAL: u64 = 4 << 20;

/// How long a shutdown waits for peers to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why an endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// A limit makes no sense.
    #[error(transparent)]
    Limit(#[from] InvalidLimit),
    /// The UDP socket could not be bound.
    #[error("cannot listen on UDP {address}: {source}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The socket is bound but could not be set up.
    #[error("cannot set up UDP {address}: {source}")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The identity cannot be used for TLS.
    #[error("identity of {peer} cannot be used: {reason}")]
    Tls {
        /// Our own name.
        peer: Peer,
        /// rustls' reason.
        reason: String,
    },
}

impl EndpointError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            EndpointError::Limit(limit) => Report::new("transport-limit", Class::Usage, text)
                .remedy(format!("correct {} in the configuration", limit.name)),
            EndpointError::Bind { address, source } => {
                let remedy = match source.kind() {
                    io::ErrorKind::AddrInUse => "stop the other daemon or choose another port",
                    io::ErrorKind::AddrNotAvailable => "use an address that this node has",
                    io::ErrorKind::PermissionDenied => "use a port above 1023 or run as root",
                    _ => "",
                };
                Report::new("transport-bind", Class::Failure, text)
                    .address(address.to_string())
                    .errno(source.raw_os_error())
                    .remedy(remedy)
            }
            EndpointError::Socket { address, source } => {
                Report::new("transport-socket", Class::Failure, text)
                    .address(address.to_string())
                    .errno(source.raw_os_error())
            }
            EndpointError::Tls { .. } => Report::new("transport-tls", Class::Failure, text)
                .remedy("issue a new certificate (crcoord pki issue)"),
        }
    }
}

/// A UDP socket with all its connections. Dropping it stops accepting; connections live on.
#[derive(Debug)]
pub struct Endpoint {
    quic: quinn::Endpoint,
    identity: RwLock<Identity>,
    limits: Arc<Limits>,
    admitted: Mutex<mpsc::Receiver<Connection>>,
    admission: AbortHandle,
}

impl Endpoint {
    /// Binds `address` (port 0: any free one). Must be called within a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        identity: Identity,
        limits: Limits,
    ) -> Result<Self, EndpointError> {
        limits.check()?;
        let server = server_config(&identity, &limits)?;
        let socket =
            UdpSocket::bind(address).map_err(|source| EndpointError::Bind { address, source })?;
        enlarge_buffers(&socket, limits.socket_buffer);
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(limits.max_mtu)
            .map_err(|error| EndpointError::Socket {
                address,
                source: io::Error::other(error),
            })?;
        let quic = quinn::Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime))
            .map_err(|source| EndpointError::Socket { address, source })?;
        let limits = Arc::new(limits);
        let (sender, admitted) = mpsc::channel(ACCEPT_QUEUE);
        let admission = tokio::spawn(admission::run(quic.clone(), limits.clone(), sender));
        Ok(Endpoint {
            quic,
            identity: RwLock::new(identity),
            limits,
            admitted: Mutex::new(admitted),
            admission: admission.abort_handle(),
        })
    }

    /// Calls the peer `expected` at `address`. Succeeds only if that very peer answers (role and
    /// name of its certificate) and has admitted us; gives up after `Limits::handshake`.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expected: &Peer,
    ) -> Result<Connection, ConnectError> {
        let identity = self.identity();
        connect::connect(&self.quic, &identity, &self.limits, address, expected).await
    }

    /// The next peer that called and proved who it is; `None` after `shutdown`. Cancel-safe. What
    /// the peer may do is for the caller to decide by [`Connection::peer`].
    pub async fn accept(&self) -> Option<Connection> {
        self.admitted.lock().await.recv().await
    }

    /// The address that is bound.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.quic.local_addr()
    }

    /// Connections open now, handshakes included.
    pub fn open_connections(&self) -> usize {
        self.quic.open_connections()
    }

    /// Our present identity.
    pub fn identity(&self) -> Identity {
        let identity = self.identity.read();
        identity.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses another identity (a renewed certificate) from now on; connections live on.
    pub fn replace_identity(&self, identity: Identity) -> Result<(), EndpointError> {
        let server = server_config(&identity, &self.limits)?;
        self.quic.set_server_config(Some(server));
        *self
            .identity
            .write()
            .unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// Closes all connections, tells the peers why, and waits a bounded time until they know.
    pub async fn shutdown(&self, reason: &str) {
        self.quic
            .close(VarInt::from_u32(CLOSE_SHUTDOWN), reason.as_bytes());
        if tokio::time::timeout(FAREWELL, self.quic.wait_idle())
            .await
            .is_err()
        {
            tracing::debug!("some peers may not have heard of the shutdown");
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.admission.abort();
    }
}

fn server_config(identity: &Identity, limits: &Limits) -> Result<ServerConfig, EndpointError> {
    let unusable = |reason: String| EndpointError::Tls {
        peer: identity.peer().clone(),
        reason,
    };
    let check = ClientCheck::new(identity).map_err(|error| unusable(error.to_string()))?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(error.to_string()))?
        .with_client_cert_verifier(Arc::new(check))
        .with_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // No resumption and no early data: every connection proves anew who is there, nothing replays.
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    let tls = QuicServerConfig::try_from(tls).map_err(|error| unusable(error.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(limits.transport())
        // A node's address does not change under a connection; a packet that says so is not its.
        .migration(false)
        .max_incoming(4 * limits.max_handshakes)
        .incoming_buffer_size(UNSEEN_BUFFER)
        .incoming_buffer_size_total(UNSEEN_BUFFER_TOTAL);
    Ok(config)
}

/// Asks for socket buffers that hold a burst of a full congestion window. With CAP_NET_ADMIN the
/// kernel gives what is asked; without, at most net.core.rmem_max and wmem_max (socket(7)).
fn enlarge_buffers(socket: &UdpSocket, bytes: usize) {
    let forced = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .and_then(|()| sockopt::set_socket_send_buffer_size_force(socket, bytes));
    let set = forced.or_else(|_| {
        sockopt::set_socket_recv_buffer_size(socket, bytes)
            .and_then(|()| sockopt::set_socket_send_buffer_size(socket, bytes))
    });
    // The kernel reports double of what was set, for its own overhead.
    match (set, sockopt::socket_recv_buffer_size(socket)) {
        (Ok(()), Ok(got)) if got / 2 >= bytes => {}
        (set, got) => tracing::warn!(
            asked = bytes,
            got = got.map(|got| got / 2).unwrap_or(0),
            error = ?set.err(),
            "UDP receive buffer is small, bulk transfers may lose packets: raise net.core.rmem_max"
        ),
    }
}
