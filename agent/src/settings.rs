//! Everything a site can choose about an agent; the command line maps the configuration file to it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crcoord_common::ids::{ClusterName, NodeName};
use crcoord_transport::IdentityPaths;

/// A coordinator as the agent calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoordinatorAddress {
    /// The name in its certificate.
    pub name: String,
    /// Its host and UDP port, looked up anew at every attempt.
    pub address: String,
}

/// An agent's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's name, the one in its certificate.
    pub node: NodeName,
    /// The cluster's name, the one in its certificate.
    pub cluster: ClusterName,
    /// Coordinators, tried in this order over and over.
    pub coordinators: Vec<CoordinatorAddress>,
    /// The UDP address that is bound.
    pub listen: SocketAddr,
    /// Where other agents reach this one; `None`: the bound address, or where that is unspecified
    /// the address from which the coordinator is reached.
    pub advertise: Option<SocketAddr>,
    /// Sockets and state of running members; must not survive a reboot.
    pub run_dir: PathBuf,
    /// The agent's own store.
    pub store_dir: PathBuf,
    /// A store on a filesystem that all nodes share.
    pub shared_dir: Option<PathBuf>,
    /// Bytes that must stay free in a store's filesystem for an epoch to be accepted.
    pub min_free_bytes: u64,
    /// Certificate, key and authority.
    pub identity: IdentityPaths,
    /// The cluster's image key, 64 hexadecimal digits, mode 0600.
    pub image_key: PathBuf,
    /// Parent of the members' virtual interfaces; `None`: the one that leads to the coordinator.
    pub uplink: Option<String>,
    /// How long processes may take to end after SIGKILL until that counts as a failure.
    pub kill_patience: Duration,
    /// How long a built member waits for the word to run before it is given up.
    pub resume_patience: Duration,
    /// The program that serves as engine (`PROGRAM engine serve`); `None`: this one.
    pub engine: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        let name = "crcoord is the built-in name, which is valid";
        Settings {
            node: "localhost".parse().expect(name),
            cluster: "cluster".parse().expect(name),
            coordinators: Vec::new(),
            listen: SocketAddr::from(([0, 0, 0, 0], 7117)),
            advertise: None,
            run_dir: "/run/crcoord".into(),
            store_dir: "/var/spool/crcoord".into(),
            shared_dir: None,
            min_free_bytes: 1 << 30,
            identity: IdentityPaths {
                certificate: "/etc/crcoord/pki/node-localhost.pem".into(),
                key: "/etc/crcoord/pki/node-localhost.key".into(),
                authority: "/etc/crcoord/pki/ca.pem".into(),
            },
            image_key: "/etc/crcoord/pki/image.key".into(),
            uplink: None,
            kill_patience: Duration::from_secs(30),
            resume_patience: Duration::from_secs(3600),
            engine: None,
        }
    }
}
