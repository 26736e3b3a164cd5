//! Command and daemon over a unix socket: one request per connection, then events until `Finished`
//! or `Failed`. The daemon knows the caller by SO_PEERCRED; nothing here says who is asking.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::control::Preflight;
use super::member::{Command, ExitStatus, NetworkMode, Placement, Stdio};
use crate::ids::{Epoch, Incarnation, JobId, JobKey, MemberId, NodeName};
use crate::report::Report;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Start a job. Events: Started, Output, MemberEnded; ends with JobEnded, or at once with
    /// JobStarted when `attach` is false.
    Run {
        /// The job's id.
        job: JobId,
        /// One member on each, in this order.
        nodes: Vec<NodeName>,
        /// The program.
        command: Command,
        /// Groups of the caller (uid and gid come from the socket).
        groups: Vec<u32>,
        /// Standard streams.
        stdio: Stdio,
        /// Network.
        network: NetworkMode,
        /// Opt-in run lease in milliseconds.
        run_lease_ms: Option<u64>,
        /// Stay until the job ends.
        attach: bool,
    },
    /// Take a global checkpoint. Events: Phase, Progress; ends with Committed, or with Opened when
    /// `wait` is false.
    Checkpoint {
        /// The job.
        job: JobId,
        /// Adopt this tree as the job's only member first.
        adopt: Option<(NodeName, i32)>,
        /// End the job after the commit.
        kill: bool,
        /// Wait for the commit.
        wait: bool,
        /// Reset connections to outside peers at restart instead of refusing.
        reset_external_tcp: bool,
    },
    /// Restart a job from a committed epoch. Events: Phase; ends with Resumed, or with JobEnded
    /// when `attach` is true.
    Restart {
        /// The job.
        job: JobId,
        /// The epoch; `None` for the newest committed one.
        epoch: Option<Epoch>,
        /// One node per member in member order; empty for automatic placement.
        nodes: Vec<NodeName>,
        /// The operator's word that these nodes' old members are dead: root and operators only.
        confirmed_dead: Vec<NodeName>,
        /// Stay until the job ends.
        attach: bool,
    },
    /// All jobs. Ends with Jobs.
    List,
    /// One job. Ends with Jobs (one entry).
    Show {
        /// The job.
        job: JobId,
    },
    /// The cluster. Ends with Cluster.
    Status,
    /// Probe nodes; all when empty. Ends with Findings.
    Check {
        /// Which.
        nodes: Vec<NodeName>,
    },
    /// Preflight of a running job, without freezing. Ends with Preflights.
    CheckJob {
        /// The job.
        job: JobId,
    },
    /// Abort the running epoch of a job, if any. Ends with Done.
    Abort {
        /// The job.
        job: JobId,
    },
    /// End a job's processes. Ends with Done.
    Kill {
        /// The job.
        job: JobId,
    },
    /// Wait until a job ends, receiving its output. Ends with JobEnded.
    Attach {
        /// The job.
        job: JobId,
    },
}

/// Phases that a caller is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Obstacles are looked for, job running.
    Preflight,
    /// Members are being frozen.
    Hold,
    /// State is being taken.
    Capture,
    /// The job runs again and its pages are streamed.
    Stream,
    /// The commit is being written.
    Commit,
    /// The old incarnation is being proven dead.
    Fence,
    /// Images are fetched and trees built.
    Build,
    /// Everything is built and starts to run.
    Resume,
}

/// One epoch as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EpochInfo {
    /// Its number.
    pub epoch: Epoch,
    /// The incarnation it was taken of.
    pub incarnation: Incarnation,
    /// When, in seconds since 1970-01-01 UTC.
    pub taken: u64,
    /// Per member: node, freeze in microseconds, raw bytes, stored bytes.
    pub members: Vec<MemberFigures>,
    /// From the request to the commit, in milliseconds.
    pub total_ms: u64,
    /// What should be known about it, for example that a part has a single copy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Report>,
}

/// What one member's part of an epoch cost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemberFigures {
    /// The member.
    pub member: MemberId,
    /// The node.
    pub node: NodeName,
    /// Time frozen, in microseconds.
    pub freeze_us: u64,
    /// Memory in the image, in bytes.
    pub raw_bytes: u64,
    /// Bytes added to one store.
    pub stored_bytes: u64,
    /// From release to seal, in milliseconds.
    pub stream_ms: u64,
}

/// State of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// All members run.
    Running,
    /// Being restarted.
    Restarting,
    /// A member's node does not answer; the job's fate is unknown.
    Unknown,
    /// All members ended.
    Ended,
}

/// One job as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobInfo {
    /// Identity.
    pub job: JobKey,
    /// Owner's uid.
    pub uid: u32,
    /// State.
    pub state: JobState,
    /// Current incarnation.
    pub incarnation: Incarnation,
    /// Where its members are.
    pub placements: Vec<Placement>,
    /// Exit statuses known so far.
    pub ended: Vec<(MemberId, ExitStatus)>,
    /// Committed epochs, oldest first.
    pub epochs: Vec<EpochInfo>,
    /// The run lease, where the job opted in, in milliseconds.
    pub run_lease_ms: Option<u64>,
    /// An epoch in progress.
    pub open_epoch: Option<(Epoch, Phase)>,
}

/// One node as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name.
    pub node: NodeName,
    /// Where its agent was last seen.
    pub address: Option<SocketAddr>,
    /// Connected now.
    pub connected: bool,
    /// Milliseconds since its last heartbeat.
    pub silent_ms: u64,
    /// Free bytes of its store.
    pub free_bytes: u64,
    /// Running members.
    pub members: u32,
}

/// What a request is answered with, one after the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A job was started.
    JobStarted {
        /// Its identity.
        job: JobKey,
        /// Where its members are.
        placements: Vec<Placement>,
    },
    /// Output of a member.
    Output {
        /// The member.
        member: MemberId,
        /// 1 or 2.
        stream: u8,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// A member ended.
    MemberEnded {
        /// The member.
        member: MemberId,
        /// How.
        status: ExitStatus,
    },
    /// Last: the job ended; the highest status in member order counts for `run`.
    JobEnded {
        /// Each member's status.
        statuses: Vec<(MemberId, ExitStatus)>,
    },
    /// An epoch was opened.
    Opened {
        /// Its number.
        epoch: Epoch,
    },
    /// A phase began.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// Streaming goes on.
    Progress {
        /// The member.
        member: MemberId,
        /// Bytes done.
        done_bytes: u64,
        /// Of about so many.
        total_bytes: u64,
    },
    /// Last: the epoch is committed.
    Committed(EpochInfo),
    /// Last (or before output when attached): the job runs again.
    Resumed {
        /// Identity.
        job: JobKey,
        /// New incarnation.
        incarnation: Incarnation,
        /// From this epoch.
        epoch: Epoch,
        /// Seconds of work lost: from the cut to the last sign of the old incarnation's life.
        lost_seconds: u64,
        /// Where its members are now.
        placements: Vec<Placement>,
    },
    /// Last: jobs.
    Jobs(Vec<JobInfo>),
    /// Last: the cluster.
    Cluster {
        /// The coordinator's term.
        term: u64,
        /// Seconds since its start.
        uptime_s: u64,
        /// Nodes.
        nodes: Vec<NodeInfo>,
    },
    /// Last: findings of a check, also of nodes that do not answer.
    Findings(Vec<Report>),
    /// Last: a job's preflight, per member.
    Preflights(Vec<(MemberId, Preflight)>),
    /// Last: nothing to tell.
    Done,
    /// Last: it failed; all reasons at once.
    Failed(Vec<Report>),
}
