//! A throwaway cluster: an authority in a temporary directory and endpoints on loopback.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its own part; a failure is a panic

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crcoord_transport::pki::{self, DEFAULT_VALIDITY, Issued, Request};
use crcoord_transport::{Connection, Endpoint, Identity, IdentityPaths, Limits, Peer, Role};
use tempfile::TempDir;

/// An authority and what it has issued.
pub struct Cluster {
    pub directory: TempDir,
    pub name: String,
}

impl Cluster {
    pub fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), name).unwrap();
        Cluster {
            directory,
            name: name.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn authority(&self) -> PathBuf {
        self.path().join(pki::AUTHORITY_CERTIFICATE)
    }

    pub fn issue(&self, role: Role, name: &str) -> Issued {
        let request = Request {
            role,
            name,
            subject_names: &[],
            validity: DEFAULT_VALIDITY,
        };
        pki::issue(self.path(), &request, self.path()).unwrap()
    }

    pub fn paths(&self, issued: &Issued) -> IdentityPaths {
        IdentityPaths {
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
            authority: self.authority(),
        }
    }

    pub fn identity(&self, role: Role, name: &str) -> Identity {
        Identity::load(&self.paths(&self.issue(role, name))).unwrap()
    }

    pub fn endpoint(&self, role: Role, name: &str) -> Endpoint {
        self.endpoint_with(role, name, Limits::default())
    }

    pub fn endpoint_with(&self, role: Role, name: &str, limits: Limits) -> Endpoint {
        Endpoint::bind(loopback(), self.identity(role, name), limits).unwrap()
    }

    pub fn peer(&self, role: Role, name: &str) -> Peer {
        Peer::new(&self.name, role, name).unwrap()
    }
}

/// Two endpoints and the connection between them, as `node n1` and `coordinator c1` see it.
pub struct Pair {
    pub cluster: Cluster,
    pub node: Endpoint,
    pub coordinator: Endpoint,
    pub from_node: Connection,
    pub from_coordinator: Connection,
}

impl Pair {
    pub async fn new(limits: Limits) -> Self {
        let cluster = Cluster::new("alpha");
        let node = cluster.endpoint_with(Role::Node, "n1", limits.clone());
        let coordinator = cluster.endpoint_with(Role::Coordinator, "c1", limits);
        let expected = cluster.peer(Role::Coordinator, "c1");
        let (from_node, from_coordinator) = meet(&node, &coordinator, &expected).await;
        Pair {
            cluster,
            node,
            coordinator,
            from_node,
            from_coordinator,
        }
    }
}

/// Connects `client` to `server`. One after the other and not joined: admission needs no `accept`,
/// and a refused client must fail the test instead of leaving `accept` waiting.
pub async fn meet(
    client: &Endpoint,
    server: &Endpoint,
    expected: &Peer,
) -> (Connection, Connection) {
    let address = server.local_address().unwrap();
    let called = client.connect(address, expected).await.unwrap();
    (called, server.accept().await.unwrap())
}

pub fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}
