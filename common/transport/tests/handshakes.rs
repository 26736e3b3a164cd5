//! Who is let in, who is refused, and what the refused side is told.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use std::fs;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crcoord_transport::{
    ConnectError, Endpoint, EndpointError, Identity, IdentityError, Limits, Lost, Role, pki,
};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use support::{Cluster, Pair, loopback, meet};

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let pair = Pair::new(Limits::default()).await;
    let (node, coordinator) = (
        pair.cluster.peer(Role::Node, "n1"),
        pair.cluster.peer(Role::Coordinator, "c1"),
    );
    assert_eq!(pair.from_node.peer(), &coordinator);
    assert_eq!(pair.from_coordinator.peer(), &node);
    assert_eq!(pair.node.identity().peer(), &node);
}

#[tokio::test]
async fn an_operator_is_let_in_but_cannot_serve() {
    let cluster = Cluster::new("alpha");
    let operator = cluster.endpoint(Role::Operator, "ada");
    let node = cluster.endpoint(Role::Node, "n1");
    let expected = cluster.peer(Role::Node, "n1");
    let (_called, accepted) = meet(&operator, &node, &expected).await;
    assert_eq!(accepted.peer().role(), Role::Operator);

    let address = operator.local_address().unwrap();
    let expected = cluster.peer(Role::Operator, "ada");
    let error = node.connect(address, &expected).await.unwrap_err();
    assert!(matches!(error, ConnectError::Untrusted { .. }), "{error}");
}

#[tokio::test]
async fn a_node_that_poses_as_coordinator_is_refused_by_the_client() {
    let cluster = Cluster::new("alpha");
    let (n1, n2) = (
        cluster.endpoint(Role::Node, "n1"),
        cluster.endpoint(Role::Node, "n2"),
    );
    let expected = cluster.peer(Role::Coordinator, "n2");
    let address = n2.local_address().unwrap();
    let error = n1.connect(address, &expected).await.unwrap_err();
    let found = cluster.peer(Role::Node, "n2");
    assert_eq!(
        error,
        ConnectError::WrongPeer {
            expected,
            address,
            found
        }
    );
}

#[tokio::test]
async fn a_peer_of_another_name_is_refused_by_the_client() {
    let cluster = Cluster::new("alpha");
    let (n1, n2) = (
        cluster.endpoint(Role::Node, "n1"),
        cluster.endpoint(Role::Node, "n2"),
    );
    let expected = cluster.peer(Role::Node, "n3");
    let error = n1
        .connect(n2.local_address().unwrap(), &expected)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::WrongPeer { .. }), "{error}");
    let report = error.report();
    assert_eq!(report.code, "transport-wrong-peer");
    assert!(
        report.message.contains("crcoord://alpha/node/n3"),
        "{report}"
    );
}

#[tokio::test]
async fn certificates_of_another_authority_are_refused_on_both_sides() {
    // The same cluster name, hence the same issuer name: only the signature tells them apart.
    let (ours, theirs) = (Cluster::new("alpha"), Cluster::new("alpha"));
    let server = ours.endpoint(Role::Coordinator, "c1");
    let stranger = theirs.endpoint(Role::Node, "n1");
    let expected = ours.peer(Role::Coordinator, "c1");
    let address = server.local_address().unwrap();
    let error = stranger.connect(address, &expected).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Untrusted { reason, .. } if reason.contains("BadSignature")),
        "{error}"
    );

    // The server's turn: a client that trusts our authority but has the other's certificate.
    let issued = theirs.issue(Role::Node, "n2");
    let outcome = raw_client(Some((&issued.certificate, &issued.key)), address).await;
    assert!(outcome.contains("BadSignature"), "{outcome}");
    assert_none_admitted(&server).await;
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let cluster = Cluster::new("alpha");
    let server = cluster.endpoint(Role::Coordinator, "c1");
    let outcome = raw_client(None, server.local_address().unwrap()).await;
    assert!(outcome.contains("peer sent no certificates"), "{outcome}");
    assert_none_admitted(&server).await;
}

#[tokio::test]
async fn a_peer_of_another_cluster_is_refused_by_the_client() {
    let cluster = Cluster::new("alpha");
    let server = cluster.endpoint(Role::Coordinator, "c1");
    let expected = crcoord_transport::Peer::new("beta", Role::Coordinator, "c1").unwrap();
    let node = cluster.endpoint(Role::Node, "n1");
    let error = node
        .connect(server.local_address().unwrap(), &expected)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::WrongPeer { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_of_another_cluster_is_refused_by_the_server_even_if_its_authority_is_trusted() {
    let (alpha, beta) = (Cluster::new("alpha"), Cluster::new("beta"));
    let both = alpha.path().join("both.pem");
    let texts = [alpha.authority(), beta.authority()].map(|path| fs::read(path).unwrap());
    fs::write(&both, texts.concat()).unwrap();
    let bind = |cluster: &Cluster, role, name| {
        let mut paths = cluster.paths(&cluster.issue(role, name));
        paths.authority = both.clone();
        let identity = Identity::load(&paths).unwrap();
        Endpoint::bind(loopback(), identity, Limits::default()).unwrap()
    };
    let server = bind(&alpha, Role::Coordinator, "c1");
    let stranger = bind(&beta, Role::Node, "n1");
    let expected = alpha.peer(Role::Coordinator, "c1");
    let address = server.local_address().unwrap();
    let error = stranger.connect(address, &expected).await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");

    // A peer of the right cluster gets in with the same two authorities.
    let node = bind(&alpha, Role::Node, "n1");
    let (_called, accepted) = meet(&node, &server, &expected).await;
    assert_eq!(accepted.peer().cluster(), "alpha");
}

#[tokio::test]
async fn an_expired_certificate_ends_no_connection_but_begins_none() {
    let cluster = Cluster::new("alpha");
    let request = pki::Request {
        role: Role::Coordinator,
        name: "c1",
        subject_names: &[],
        validity: Duration::from_secs(2),
    };
    let issued = pki::issue(cluster.path(), &request, cluster.path()).unwrap();
    let identity = Identity::load(&cluster.paths(&issued)).unwrap();
    let server = Endpoint::bind(loopback(), identity, Limits::default()).unwrap();
    let node = cluster.endpoint(Role::Node, "n1");
    let expected = cluster.peer(Role::Coordinator, "c1");
    let address = server.local_address().unwrap();
    let (called, accepted) = meet(&node, &server, &expected).await;

    // X.509 counts whole seconds and the last one is still valid.
    let over = issued.expires + Duration::from_secs(1);
    while let Ok(left) = over.duration_since(SystemTime::now()) {
        tokio::time::sleep(left).await;
    }
    let error = node.connect(address, &expected).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Untrusted { reason, .. } if reason.contains("expired")),
        "{error}"
    );
    let error = Identity::load(&cluster.paths(&issued)).unwrap_err();
    assert!(matches!(error, IdentityError::Expired { .. }), "{error}");
    let (opened, got) = tokio::join!(called.open_control(), accepted.accept_stream());
    opened.unwrap();
    got.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let cluster = Cluster::new("alpha");
    let first = cluster.endpoint(Role::Node, "n1");
    let address = first.local_address().unwrap();
    let error = Endpoint::bind(
        address,
        cluster.identity(Role::Node, "n2"),
        Limits::default(),
    )
    .unwrap_err();
    assert!(matches!(error, EndpointError::Bind { .. }));
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    let report = error.report();
    assert_eq!(report.place.address, Some(address.to_string()));
    assert!(
        report.errno.is_some() && !report.remedy.is_empty(),
        "{report}"
    );
}

#[tokio::test]
async fn a_silent_address_is_given_up_in_time() {
    let cluster = Cluster::new("alpha");
    let mute = UdpSocket::bind(loopback()).unwrap();
    let limits = Limits {
        handshake: Duration::from_millis(200),
        ..Limits::default()
    };
    let node = cluster.endpoint_with(Role::Node, "n1", limits);
    let expected = cluster.peer(Role::Coordinator, "c1");
    let error = node
        .connect(mute.local_addr().unwrap(), &expected)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Silent { .. }), "{error}");
}

#[tokio::test]
async fn half_open_connections_do_not_keep_peers_out() {
    let cluster = Cluster::new("alpha");
    let limits = Limits {
        max_handshakes: 4,
        handshake: Duration::from_secs(60), // longer than a node waits: none frees up by itself
        ..Limits::default()
    };
    let server = cluster.endpoint_with(Role::Coordinator, "c1", limits);
    let address = server.local_address().unwrap();
    // Clients that vanish after their first packet: a relay passes it on and then drops all.
    let mut vanished = Vec::new();
    for number in 0..40 {
        let relay = UdpSocket::bind(loopback()).unwrap();
        relay
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let node = cluster.endpoint(Role::Node, &format!("gone{number}"));
        let expected = cluster.peer(Role::Coordinator, "c1");
        let target = relay.local_addr().unwrap();
        let call = tokio::spawn(async move { node.connect(target, &expected).await.err() });
        let relay = tokio::task::spawn_blocking(move || {
            let mut packet = [0; 2048];
            let length = relay.recv(&mut packet).unwrap();
            relay.send_to(&packet[..length], address).unwrap();
            relay
        })
        .await
        .unwrap();
        vanished.push((relay, call));
    }
    let node = cluster.endpoint(Role::Node, "n1");
    let expected = cluster.peer(Role::Coordinator, "c1");
    let (_called, accepted) = meet(&node, &server, &expected).await;
    assert_eq!(accepted.peer().name(), "n1");
    assert!(
        server.open_connections() <= 1 + 4,
        "{}",
        server.open_connections()
    );
    for (_relay, call) in vanished {
        call.abort();
    }
}

#[tokio::test]
async fn more_connections_than_allowed_are_refused_by_name() {
    let cluster = Cluster::new("alpha");
    let limits = Limits {
        max_connections: 1,
        ..Limits::default()
    };
    let server = cluster.endpoint_with(Role::Coordinator, "c1", limits);
    let address = server.local_address().unwrap();
    let expected = cluster.peer(Role::Coordinator, "c1");
    let (n1, n2) = (
        cluster.endpoint(Role::Node, "n1"),
        cluster.endpoint(Role::Node, "n2"),
    );
    let (_first, _accepted) = meet(&n1, &server, &expected).await;
    let error = n2.connect(address, &expected).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Refused { reason, .. } if reason.contains("too many")),
        "{error}"
    );
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let cluster = Cluster::new("alpha");
    let (node, server) = (
        cluster.endpoint(Role::Node, "n1"),
        cluster.endpoint(Role::Coordinator, "c1"),
    );
    let address = server.local_address().unwrap();
    let old = cluster.peer(Role::Coordinator, "c1");
    let (first, accepted) = meet(&node, &server, &old).await;
    server
        .replace_identity(cluster.identity(Role::Coordinator, "c2"))
        .unwrap();
    let new = cluster.peer(Role::Coordinator, "c2");
    meet(&node, &server, &new).await;
    assert!(node.connect(address, &old).await.is_err());
    assert_eq!((first.lost_reason(), accepted.lost_reason()), (None, None));
}

#[tokio::test]
async fn a_shutdown_reaches_the_peer_with_its_reason() {
    let pair = Pair::new(Limits::default()).await;
    pair.coordinator.shutdown("upgrade").await;
    let lost = pair.from_node.closed().await;
    assert_eq!(
        lost,
        Lost::ClosedByPeer {
            code: 0,
            reason: "upgrade".into()
        }
    );
    assert!(pair.coordinator.accept().await.is_none());
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_lost_after_the_idle_time() {
    let limits = Limits {
        idle: Duration::from_millis(400),
        keep_alive: Duration::from_millis(100),
        ..Limits::default()
    };
    let cluster = Cluster::new("alpha");
    let server = cluster.endpoint_with(Role::Coordinator, "c1", limits.clone());
    let address = server.local_address().unwrap();
    let expected = cluster.peer(Role::Coordinator, "c1");
    // The node lives in a runtime of its own, which then stops dead as a killed process would.
    let node = cluster.identity(Role::Node, "n1");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let call = runtime.spawn(async move {
        let endpoint = Endpoint::bind(loopback(), node, limits).unwrap();
        let connection = endpoint.connect(address, &expected).await.unwrap();
        (endpoint, connection)
    });
    let accepted = server.accept().await.unwrap();
    let alive = call.await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(1200), accepted.closed()).await;
    assert!(
        early.is_err(),
        "keep-alives must hold an idle connection open: {early:?}"
    );
    runtime.shutdown_background();
    assert_eq!(accepted.closed().await, Lost::Silent);
    std::mem::forget(alive); // dropping it would wake the dead runtime's connection to say goodbye
}

/// A plain quinn client that trusts any server, with any certificate or none. Gives the reason for which the server closed the connection.
async fn raw_client(
    certificate: Option<(&std::path::Path, &std::path::Path)>,
    address: std::net::SocketAddr,
) -> String {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAll(provider)));
    let mut tls = match certificate {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
    };
    tls.alpn_protocols = vec![b"crcoord/1".to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let connecting = endpoint.connect_with(config, address, "any.name").unwrap();
    match connecting.await {
        Err(error) => error.to_string(),
        // The client's own handshake is done before the server has seen its certificate.
        Ok(connection) => match connection.accept_uni().await {
            Ok(_) => "welcome".to_owned(),
            Err(error) => error.to_string(),
        },
    }
}

async fn assert_none_admitted(server: &Endpoint) {
    server.shutdown("test is over").await;
    assert!(server.accept().await.is_none());
}

#[derive(Debug)]
struct TrustAll(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TrustAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
