//! What a member is made of, as jobs are described on every wire and in the journal.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::ids::{MemberId, NodeName};
use crate::image::ChunkId;

/// Whose credentials a job's processes have, taken from the caller or the scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A program to start.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Command {
    /// The program and its arguments; the program is looked up in the `PATH` of `environment`.
    pub arguments: Vec<String>,
    /// The whole environment. Each member additionally sees `CRCOORD_JOB`, `CRCOORD_MEMBER`,
    /// `CRCOORD_MEMBERS`, `CRCOORD_NODES` and `CRCOORD_ADDRESSES`.
    pub environment: BTreeMap<String, String>,
    /// Working directory.
    pub directory: String,
    /// File mode creation mask.
    pub umask: u32,
}

/// Where a member's standard streams go.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stdio {
    /// Input from /dev/null, output to files opened for appending as the owner. `%j` is the job id,
    /// `%m` the member, `%n` the node; a relative path starts at the working directory.
    Files {
        /// Standard output.
        output: String,
        /// Standard error; the same file as `output` when equal.
        error: String,
    },
    /// Input from /dev/null, output through agent and coordinator to the command that started or
    /// restarted the job. While nobody is attached, output is kept up to a pipe's capacity and the
    /// program then waits.
    Caller,
}

/// In which network a member lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// The node's own network; a restart on another node rewrites both ends of every connection.
    Host,
    /// A network namespace of its own with a virtual address that moves with the member.
    Virtual,
}

/// A job as it was asked for: everything a restart needs besides images.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobSpec {
    /// Whose job it is.
    pub owner: Owner,
    /// What runs; `None` for adopted trees.
    pub command: Option<Command>,
    /// Standard streams.
    pub stdio: Stdio,
    /// Network.
    pub network: NetworkMode,
    /// Opt-in run lease in milliseconds: a capsule that hears nothing of its coordinator for this
    /// long ends itself.
    pub run_lease_ms: Option<u64>,
    /// Number of members.
    pub members: u32,
}

/// Where one member is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// The member.
    pub member: MemberId,
    /// Its node.
    pub node: NodeName,
    /// Its address: virtual, or the node's own in [`NetworkMode::Host`].
    pub address: IpAddr,
}

/// The network one member's capsule is given.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberNetwork {
    /// The node's own.
    Host,
    /// A namespace of its own.
    Virtual {
        /// The member's address.
        address: IpAddr,
        /// Prefix length of the job's network.
        prefix: u8,
    },
}

/// What a capsule is started with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CapsuleSpec {
    /// Credentials of the program.
    pub owner: Owner,
    /// Standard streams.
    pub stdio: Stdio,
    /// Network.
    pub network: MemberNetwork,
    /// Host name inside the capsule (UTS namespace): the member's first node, kept for life.
    pub hostname: String,
    /// Run lease in milliseconds.
    pub run_lease_ms: Option<u64>,
    /// All members and their addresses, for the environment and for /etc/hosts.
    pub placements: Vec<Placement>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It exited with this code.
    Exited(i32),
    /// It was ended by this signal.
    Signaled(i32),
    /// Its node was lost or its capsule ended without telling.
    Lost,
}

/// One end of an established TCP connection at the cut. The peer's `received` tells a restored
/// sender what it must not send again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TcpEnd {
    /// This end's address.
    pub local: SocketAddr,
    /// The other end's address.
    pub peer: SocketAddr,
    /// Sequence number of the next byte that this end expects (`rcv_nxt`).
    pub received: u32,
}

/// Where a part can be fetched from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Replica {
    /// The store of this node's agent.
    Node(NodeName),
    /// The shared directory.
    Shared,
}

/// What an epoch's commit says of one member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemberCommit {
    /// The member.
    pub member: MemberId,
    /// The node that held it.
    pub node: NodeName,
    /// Hash of its encoded manifest.
    pub manifest: ChunkId,
    /// Where the part is durable.
    pub replicas: Vec<Replica>,
    /// Bytes of memory in the image.
    pub raw_bytes: u64,
    /// Bytes this epoch added to one store.
    pub stored_bytes: u64,
    /// How long the member was frozen, in microseconds.
    pub freeze_us: u64,
    /// Its established TCP connections at the cut.
    pub connections: Vec<TcpEnd>,
}
