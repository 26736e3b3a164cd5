//! The outgoing side: one attempt to reach an expected peer, and why it failed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crcoord_common::report::{Class, Report};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, TransportErrorCode};
use rustls::client::Resumption;
use rustls::version::TLS13;

use crate::connection::{Connection, Lost};
use crate::endpoint::{ALPN, SERVER_NAME, WELCOME};
use crate::identity::{Identity, provider};
use crate::limits::Limits;
use crate::peer::{Peer, PeerError};
use crate::verify::{Refusal, ServerCheck};

/// Why a peer could not be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answered in time, or not to the end.
    #[error("{expected} at UDP {address} did not answer within {}s", after.as_secs_f64())]
    Silent {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// How long we waited.
        after: Duration,
    },
    /// Somebody else of our cluster answered.
    #[error("{found} answered at UDP {address} instead of {expected}")]
    WrongPeer {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// Who is there.
        found: Peer,
    },
    /// The peer's certificate is not valid for us.
    #[error("certificate of {expected} at UDP {address} refused: {reason}")]
    Untrusted {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The peer does not take us.
    #[error("{expected} at UDP {address} refused this side: {reason}")]
    Refused {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// The peer's words.
        reason: String,
    },
    /// We have as many connections as we may.
    #[error("{expected} at UDP {address} not called: {limit} connections are open, the limit")]
    TooMany {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// `Limits::max_connections`.
        limit: usize,
    },
    /// Something else went wrong.
    #[error("connecting to {expected} at UDP {address} failed: {reason}")]
    Failed {
        /// Whom we wanted.
        expected: Peer,
        /// Where.
        address: SocketAddr,
        /// What.
        reason: String,
    },
}

impl ConnectError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let (code, class, address, remedy) = match self {
            ConnectError::Silent { address, .. } => (
                "transport-silent",
                Class::Unreachable,
                address,
                "start the daemon there, and let UDP pass between the nodes",
            ),
            ConnectError::WrongPeer { address, .. } => (
                "transport-wrong-peer",
                Class::Denied,
                address,
                "correct the peer's address or name in the configuration",
            ),
            ConnectError::Untrusted { address, .. } => (
                "transport-untrusted",
                Class::Denied,
                address,
                "issue the peer a certificate by this cluster's authority (crcoord pki issue)",
            ),
            ConnectError::Refused { address, .. } => (
                "transport-refused",
                Class::Denied,
                address,
                "look into the peer's log, and renew this side's certificate if it says so",
            ),
            ConnectError::TooMany { address, .. } => (
                "transport-too-many",
                Class::Failure,
                address,
                "raise max_connections",
            ),
            ConnectError::Failed { address, .. } => {
                ("transport-connect", Class::Unreachable, address, "")
            }
        };
        Report::new(code, class, self.to_string())
            .address(address.to_string())
            .remedy(remedy)
    }
}

/// Calls `expected` at `address`.
pub(crate) async fn connect(
    endpoint: &quinn::Endpoint,
    identity: &Identity,
    limits: &Arc<Limits>,
    address: SocketAddr,
    expected: &Peer,
) -> Result<Connection, ConnectError> {
    let attempt = Attempt {
        address,
        expected,
        limits,
        check: Arc::new(ServerCheck::new(identity, expected.clone())),
    };
    if endpoint.open_connections() >= limits.max_connections {
        return Err(ConnectError::TooMany {
            expected: expected.clone(),
            address,
            limit: limits.max_connections,
        });
    }
    match tokio::time::timeout(limits.handshake, attempt.run(endpoint, identity)).await {
        Ok(result) => result,
        Err(_) => Err(attempt.silent()),
    }
}

struct Attempt<'a> {
    address: SocketAddr,
    expected: &'a Peer,
    limits: &'a Arc<Limits>,
    check: Arc<ServerCheck>,
}

impl Attempt<'_> {
    async fn run(
        &self,
        endpoint: &quinn::Endpoint,
        identity: &Identity,
    ) -> Result<Connection, ConnectError> {
        let config = client_config(identity, self.limits, self.check.clone())
            .map_err(|error| self.failed(error))?;
        let connecting = endpoint
            .connect_with(config, self.address, SERVER_NAME)
            .map_err(|error| self.failed(error.to_string()))?;
        let quic = connecting.await.map_err(|error| self.explain(error))?;
        // In TLS 1.3 a client is done before the server has looked at its certificate; only the
        // welcome says that we were taken.
        let mut welcome = quic
            .accept_uni()
            .await
            .map_err(|error| self.explain(error))?;
        match welcome.read_to_end(WELCOME.len()).await {
            Ok(bytes) if bytes == WELCOME => {}
            Ok(bytes) => return Err(self.failed(format!("unknown welcome {bytes:?}"))),
            Err(error) => match quic.close_reason() {
                Some(reason) => return Err(self.explain(reason)),
                None => return Err(self.failed(error.to_string())),
            },
        }
        Ok(Connection::new(
            quic,
            self.expected.clone(),
            self.limits.clone(),
        ))
    }

    fn explain(&self, error: ConnectionError) -> ConnectError {
        let (expected, address) = (self.expected.clone(), self.address);
        match self.check.refusal() {
            Some(Refusal::Other(found)) => {
                return ConnectError::WrongPeer {
                    expected,
                    address,
                    found,
                };
            }
            Some(Refusal::Invalid(reason)) => {
                return ConnectError::Untrusted {
                    expected,
                    address,
                    reason,
                };
            }
            None => {}
        }
        let reason = match error {
            ConnectionError::TimedOut => return self.silent(),
            ConnectionError::ConnectionClosed(close) => match close.error_code {
                TransportErrorCode::CONNECTION_REFUSED => "it has too many connections".into(),
                _ => close.to_string(),
            },
            ConnectionError::ApplicationClosed(_) => Lost::from(error).to_string(),
            other => return self.failed(other.to_string()),
        };
        ConnectError::Refused {
            expected,
            address,
            reason,
        }
    }

    fn silent(&self) -> ConnectError {
        ConnectError::Silent {
            expected: self.expected.clone(),
            address: self.address,
            after: self.limits.handshake,
        }
    }

    fn failed(&self, reason: String) -> ConnectError {
        ConnectError::Failed {
            expected: self.expected.clone(),
            address: self.address,
            reason,
        }
    }
}

fn client_config(
    identity: &Identity,
    limits: &Limits,
    check: Arc<ServerCheck>,
) -> Result<ClientConfig, String> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| error.to_string())?
        .dangerous() // rustls' word for any verifier but its own; ours checks chain and name
        .with_custom_certificate_verifier(check)
        .with_client_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    tls.enable_sni = false;
    let tls = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(limits.transport());
    Ok(config)
}

/// The peer of an established connection by the certificate that the handshake has verified.
pub(crate) fn verified_peer(quic: &quinn::Connection) -> Result<Peer, PeerError> {
    let identity = quic.peer_identity();
    let chain = identity.and_then(|any| {
        any.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>()
            .ok()
    });
    match chain.as_deref().and_then(|chain| chain.first()) {
        Some(certificate) => Peer::of_certificate(certificate),
        None => Err(PeerError::Count(0)),
    }
}
