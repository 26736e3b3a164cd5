//! Every key of the configuration: one line gives name, type, default and meaning.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::value::{Address, Raw, Value};
use crate::ids::{ClusterName, NodeName};
use crate::units::ByteSize;

/// The UDP port of all daemons.
const PORT: u16 = 7117;

/// One key as it is described to people and looked up by name.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The section, for example `agent`.
    pub section: &'static str,
    /// The name within it, for example `listen`.
    pub name: &'static str,
    /// What it means.
    pub meaning: &'static str,
    pub(super) set: fn(&mut Config, &Raw) -> Result<(), String>,
    pub(super) show: fn(&Config) -> String,
}

impl Key {
    /// `section.name`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The environment variable that sets it: `CRCOORD_SECTION_NAME`.
    pub fn variable(&self) -> String {
        format!("CRCOORD_{}_{}", self.section, self.name).to_ascii_uppercase()
    }
}

macro_rules! sections {
    ($(
        $(#[doc = $about:literal])*
        $section:ident: $Section:ident {
            $($(#[doc = $meaning:literal])* $name:ident: $type:ty = $default:expr,)*
        }
    )*) => {
        $(
            $(#[doc = $about])*
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $Section {
                $($(#[doc = $meaning])* pub $name: $type,)*
            }

            impl Default for $Section {
                fn default() -> Self {
                    $Section { $($name: $default,)* }
                }
            }
        )*

        /// The whole configuration.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Config {
            $($(#[doc = $about])* pub $section: $Section,)*
        }

        impl Config {
            /// All keys in the order in which they are shown.
            pub const KEYS: &'static [Key] = &[$($(
                Key {
                    section: stringify!($section),
                    name: stringify!($name),
                    meaning: concat!($($meaning,)*),
                    set: |config, raw| {
                        config.$section.$name = Value::read(raw)?;
                        Ok(())
                    },
                    show: |config| config.$section.$name.write(),
                },
            )*)*];

            /// The names of all sections.
            pub const SECTIONS: &'static [&'static str] = &[$(stringify!($section),)*];
        }
    };
}

sections! {
    /// What all daemons and commands of a cluster share.
    cluster: Cluster {
        /// Name of the cluster, as in its certificates.
        name: ClusterName = name("cluster"),
        /// Directory of certificates and keys (ca.pem, ROLE-NAME.pem, ROLE-NAME.key, image.key).
        pki_dir: PathBuf = "/etc/crcoord/pki".into(),
    }
    /// The coordinator, and what others need to find it.
    coordinator: Coordinator {
        /// Name in the coordinator's certificate.
        name: NodeName = name("coordinator"),
        /// UDP address on which it listens.
        listen: SocketAddr = any(PORT),
        /// Where agents find it.
        address: Option<Address> = None,
        /// Unix socket of the commands.
        socket: PathBuf = "/run/crcoord/coordinator.sock".into(),
        /// Directory of the journal.
        state_dir: PathBuf = "/var/lib/crcoord".into(),
        /// Users (names or uids) who may act on every job.
        operators: Vec<String> = Vec::new(),
        /// How often agents report.
        heartbeat: Duration = Duration::from_secs(1),
        /// A silent agent counts as lost after this long.
        lost_after: Duration = Duration::from_secs(5),
        /// A frozen member thaws by itself after this long without renewal.
        hold_lease: Duration = Duration::from_secs(10),
        /// Longest time a job may be frozen in one checkpoint, renewals included.
        hold_limit: Duration = Duration::from_secs(60),
        /// An agent must answer a small request within this time.
        answer_limit: Duration = Duration::from_secs(30),
        /// A capture must be answered within this time.
        capture_limit: Duration = Duration::from_secs(60),
        /// A member whose pages are streamed must show progress within this time.
        stream_limit: Duration = Duration::from_secs(120),
        /// A member that is being built must show progress within this time.
        build_limit: Duration = Duration::from_secs(120),
        /// Added to a run lease before it counts as run out; at least lost_after.
        run_lease_margin: Duration = Duration::from_secs(5),
        /// Copies of every part in the stores of other nodes: 0 or 1.
        copies: u32 = 1,
    }
    /// The agent of a compute node.
    agent: Agent {
        /// Name of the node; empty: the host name up to its first dot.
        node: Option<NodeName> = None,
        /// UDP address on which it listens.
        listen: SocketAddr = any(PORT),
        /// Where other agents reach it; empty: the address from which it reaches the coordinator.
        address: Option<SocketAddr> = None,
        /// Directory of the agent's sockets and of running members.
        run_dir: PathBuf = "/run/crcoord".into(),
        /// Directory of the node's own store.
        store_dir: PathBuf = "/var/spool/crcoord".into(),
        /// Directory on a filesystem that all nodes share, for one more copy of every part.
        shared_dir: Option<PathBuf> = None,
        /// Bytes that a new epoch must leave free in the store.
        min_free: ByteSize = ByteSize(1 << 30),
        /// Killed processes must have ended within this time.
        kill_limit: Duration = Duration::from_secs(30),
        /// A built member that is not resumed within this time is given up.
        resume_limit: Duration = Duration::from_secs(3600),
    }
    /// Networks of jobs that run with `--network virtual`.
    network: Network {
        /// Interface that joins the nodes; empty: the one that leads to the coordinator.
        uplink: Option<String> = None,
        /// Addresses that are given to members.
        pool: String = "10.177.128.0/17".to_owned(),
    }
    /// Which epochs are kept.
    retention: Retention {
        /// Committed epochs kept of a living job.
        epochs: u32 = 2,
    }
}

fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse()
        .expect("the constant is a valid name, as the test of the defaults shows")
}

const fn any(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
}
