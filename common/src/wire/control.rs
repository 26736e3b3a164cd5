//! Coordinator and agent: one control stream per agent. The agent opens it and says
//! [`FromAgent::Hello`]; every later request of the coordinator carries its term and is answered
//! under the same request id, with [`FromAgent::Failed`] where it cannot be done.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::member::{CapsuleSpec, Command, ExitStatus, MemberCommit, Replica, TcpEnd};
use crate::ids::{Epoch, MemberKey, NodeName, PartKey, RequestId, Term};
use crate::image::ChunkId;
use crate::report::Report;

/// A message with what makes it fenced. Events that answer nothing have request id 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Frame<T> {
    /// Request that this is, or answers.
    pub request: RequestId,
    /// The coordinator's term. An agent refuses terms older than the newest it has seen.
    pub term: Term,
    /// The message.
    pub body: T,
}

/// From the coordinator to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToAgent {
    /// Answers Hello.
    Welcome {
        /// How often the agent sends a heartbeat, in milliseconds.
        heartbeat_ms: u64,
        /// The coordinator's key of the cluster, to be compared with the agent's own.
        cluster: String,
    },
    /// Answers a heartbeat.
    Alive,
    /// Start a member's program in a capsule of its own. Answer: Started.
    Start {
        /// The member.
        key: MemberKey,
        /// Its capsule.
        capsule: CapsuleSpec,
        /// Its program.
        command: Command,
    },
    /// Take a running tree as a member. Answer: Started.
    Adopt {
        /// The member.
        key: MemberKey,
        /// Root of the tree, in the node's initial PID namespace.
        pid: i32,
        /// Uid of the caller who asked; only root may adopt another user's tree.
        caller: u32,
    },
    /// Look for obstacles, job running. Answer: Preflighted.
    Preflight {
        /// The member.
        key: MemberKey,
        /// The epoch that is being prepared.
        epoch: Epoch,
        /// Choices of the request.
        options: CaptureOptions,
    },
    /// Lock the member's network and freeze it. Answer: Held.
    Hold {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
        /// The member thaws by itself after this long, in milliseconds, unless renewed.
        lease_ms: u64,
    },
    /// Renew the lease of a hold. Answer: Done, or Failed when the hold has ended.
    Renew {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
        /// The new lease, from receipt, in milliseconds.
        lease_ms: u64,
    },
    /// Take the state of a held member. Answer: Captured.
    Capture {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
    },
    /// Thaw and unlock after a capture, then stream its pages. Answers: Released, later Sealed;
    /// Progress in between.
    Release {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
        /// Where copies of the part go besides the agent's own store.
        copies: Vec<CopyTarget>,
    },
    /// Drop everything of an unfinished epoch and thaw. Answer: Done, also when there is nothing.
    Abort {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
    },
    /// The epoch is committed: keep the record beside each part of the epoch in the agent's store,
    /// also parts of other members. Answer: Done.
    Commit {
        /// One of the parts.
        part: PartKey,
        /// The encoded commit record.
        #[serde(with = "serde_bytes")]
        record: Vec<u8>,
    },
    /// Remove all parts of an epoch that is no longer wanted. Answer: Done.
    Retire {
        /// One of its parts.
        part: PartKey,
    },
    /// End a member's tree and its capsule, and prove it. Answer: Killed.
    Kill {
        /// The member.
        key: MemberKey,
    },
    /// Send a signal to the root process of a member. Answer: Done.
    Signal {
        /// The member.
        key: MemberKey,
        /// The signal's number.
        signal: i32,
    },
    /// Build a member from an image and stop before its first instruction. Answer: Built.
    Build {
        /// The member, in its new incarnation.
        key: MemberKey,
        /// The capsule to build it in.
        capsule: CapsuleSpec,
        /// What to build and where from.
        restore: RestoreOrder,
    },
    /// Let a built member run. Answer: Done.
    Resume {
        /// The member.
        key: MemberKey,
    },
    /// Renew the run lease of a member. Carries the number of the heartbeat that it answers. Not
    /// answered.
    RunLease {
        /// The member.
        key: MemberKey,
        /// From the sending of that heartbeat, or from receipt where the number is 0, in
        /// milliseconds.
        lease_ms: u64,
    },
    /// Somebody takes the output of a member with [`super::member::Stdio::Caller`] (or nobody does
    /// any more: keep it up to a pipe's capacity, then let the program wait). Off until told. Not
    /// answered; sent again after each Hello.
    Listen {
        /// The member.
        key: MemberKey,
        /// True: send its Output.
        on: bool,
    },
    /// Probe the node. Answer: Checked.
    Check,
    /// The coordinator has recorded this member's exit: forget it. Not answered.
    Forget {
        /// The member.
        key: MemberKey,
    },
}

/// Choices of a checkpoint request that the engine needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CaptureOptions {
    /// Established TCP connections to peers outside the job are reset at restart instead of being
    /// an obstacle.
    #[serde(default)]
    pub reset_external_tcp: bool,
    /// Addresses of the job's members: connections between them are inside the job.
    #[serde(default)]
    pub members: Vec<std::net::IpAddr>,
}

/// A second place for a part.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyTarget {
    /// Another agent's store.
    Partner {
        /// Its node.
        node: NodeName,
        /// Its address.
        address: SocketAddr,
    },
    /// The shared directory of the configuration.
    Shared,
}

/// Where a part comes from at restart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The agent's own store.
    Own,
    /// Another agent's store.
    Partner {
        /// Its node.
        node: NodeName,
        /// Its address.
        address: SocketAddr,
    },
    /// The shared directory.
    Shared,
}

/// Everything about a restore that is not in the image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// The part.
    pub part: PartKey,
    /// Hash of its manifest, from the commit record.
    pub manifest: ChunkId,
    /// Where to look for it, nearest first.
    pub sources: Vec<Source>,
    /// All ends of established connections of the whole job at the cut.
    pub connections: Vec<TcpEnd>,
    /// Old address -> new address for jobs in the host's network; empty when addresses are kept.
    pub addresses: Vec<(std::net::IpAddr, std::net::IpAddr)>,
}

/// What a preflight found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Preflight {
    /// Every reason why a checkpoint is not possible, and notes.
    pub findings: Vec<Report>,
    /// Processes in the tree.
    pub processes: u32,
    /// Threads in the tree.
    pub threads: u32,
    /// Resident bytes that a capture would have to read.
    pub memory_bytes: u64,
}

/// What a capture took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CaptureSummary {
    /// Processes.
    pub processes: u32,
    /// Threads.
    pub threads: u32,
    /// Bytes of memory that will be streamed, an upper bound.
    pub memory_bytes: u64,
    /// Bytes of memory copied while the member was frozen.
    pub copied_bytes: u64,
    /// Established TCP connections.
    pub connections: Vec<TcpEnd>,
}

/// A member as its agent knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemberState {
    /// The member.
    pub key: MemberKey,
    /// Set when it has ended.
    pub ended: Option<ExitStatus>,
    /// The epoch of a hold or of streaming that is going on.
    pub epoch: Option<Epoch>,
}

/// A part in an agent's store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartState {
    /// The part.
    pub part: PartKey,
    /// True when its commit record is beside it.
    pub committed: bool,
}

/// From an agent to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromAgent {
    /// First message on the stream.
    Hello {
        /// [`super::WIRE_VERSION`] of the agent.
        version: u16,
        /// The node; must be the one in the certificate.
        node: NodeName,
        /// Where other agents reach this one for bulk streams.
        bulk: SocketAddr,
        /// Members that run here or ended here and were not forgotten.
        members: Vec<MemberState>,
        /// Parts in its store.
        parts: Vec<PartState>,
        /// Free bytes of its store.
        free_bytes: u64,
    },
    /// Sent every `heartbeat_ms`. Its frame has a number above 0, never used again, where the agent
    /// counts run leases from its sending; else 0.
    Heartbeat {
        /// Free bytes of its store.
        free_bytes: u64,
    },
    /// A member's program runs.
    Started {
        /// Root process in the node's initial PID namespace.
        pid: i32,
        /// Credentials of an adopted tree's root process.
        owner: super::member::Owner,
    },
    /// A member ended. Not an answer; repeated in Hello until forgotten.
    Ended {
        /// The member.
        key: MemberKey,
        /// How.
        status: ExitStatus,
    },
    /// Output of a member. Not an answer.
    Output {
        /// The member.
        key: MemberKey,
        /// 1 or 2.
        stream: u8,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Preflight is done.
    Preflighted(Preflight),
    /// The member is frozen and its network lock is in force on every CPU.
    Held {
        /// How long freezing took, in microseconds.
        freeze_us: u64,
    },
    /// The state is taken.
    Captured(CaptureSummary),
    /// The member runs again.
    Released {
        /// How long it did not run, in microseconds.
        frozen_us: u64,
    },
    /// Streaming goes on. Not an answer.
    Progress {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
        /// Bytes read from memory so far.
        done_bytes: u64,
        /// Of about so many.
        total_bytes: u64,
    },
    /// The part is durable everywhere it was asked for. Second answer to Release.
    Sealed {
        /// What the commit will say, without `node` filled in by anybody else.
        commit: MemberCommit,
    },
    /// A hold ended by its lease or because its engine died; the epoch is poisoned. Not an answer.
    HoldLost {
        /// The member.
        key: MemberKey,
        /// The epoch.
        epoch: Epoch,
        /// Why.
        report: Report,
    },
    /// The member's processes are gone, proven by the kernel.
    Killed,
    /// A member is built and waits for Resume.
    Built {
        /// Bytes fetched from other nodes.
        fetched_bytes: u64,
        /// Bytes filled into memory.
        filled_bytes: u64,
        /// Where the part is now durable besides the replicas that were known.
        replica: Option<Replica>,
    },
    /// Answer to Check.
    Checked {
        /// Findings: notes and obstacles.
        findings: Vec<Report>,
    },
    /// Done, nothing to tell.
    Done,
    /// The request could not be done.
    Failed(Report),
}
