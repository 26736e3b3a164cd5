//! What an agent and a capsule's PID 1 say to each other over the capsule's unix socket.
//!
//! One request per frame, answered by one frame; a connection that asked to [`Ask::Watch`] gets
//! events from then on. A capsule outlives agents, so a newer agent meets older capsules: fields
//! are only ever added, with a default.

use serde::{Deserialize, Serialize};

use crcoord_common::report::Report;
use crcoord_common::wire::member::{Command, ExitStatus, Owner, Stdio};

/// Version of this protocol, told in [`Status`].
pub const VERSION: u16 = 1;
/// Largest message, in bytes: a program's arguments and environment fit in.
pub const MESSAGE_LIMIT: u32 = 4 << 20;
/// Most output bytes in one event.
pub const OUTPUT_BYTES: usize = 64 << 10;

/// What a capsule is made with: sent once by the agent over the capsule's descriptor 3.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Where its socket is bound.
    pub socket: String,
    /// Host name inside.
    pub hostname: String,
    /// A network namespace of its own.
    pub own_network: bool,
    /// A file bound over /etc/hosts.
    pub hosts: Option<String>,
    /// The directory of its cgroup, which exists.
    pub cgroup: Option<String>,
    /// Whose job it is.
    pub owner: Owner,
    /// Standard streams, patterns replaced.
    pub stdio: Stdio,
    /// Run lease in milliseconds.
    pub run_lease_ms: Option<u64>,
}

/// What the capsule says over descriptor 3; it then waits for one byte before it goes on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Announcement {
    /// PID 1 exists; its pid in the agent's PID namespace. It cannot be reused before the agent's
    /// byte has arrived.
    Init {
        /// The pid.
        pid: i32,
    },
    /// PID 1 listens and its namespaces are set up.
    Ready,
    /// It could not be made; nothing is left.
    Failed(Report),
}

/// A request of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Answer: Status.
    Status,
    /// Start the program. Answer: Started.
    Start {
        /// What to start, its environment complete.
        command: Command,
    },
    /// Tell the exit from now on, and output where that is wanted; an earlier watcher's connection
    /// is closed. May be asked again on the same connection with another choice, without loss.
    /// Answer: Done.
    Watch {
        /// True: send all output, and the exit after it. False: leave output in the pipes, so that
        /// the program waits once they are full, and tell the exit at once.
        output: bool,
    },
    /// Answer: Done.
    RenewLease {
        /// From now, in milliseconds.
        lease_ms: u64,
    },
    /// The write ends of the standard streams. Answer: Streams, with the descriptors attached.
    Streams,
    /// An engine has built a tree: this child of PID 1 is its root. Answer: Done.
    Expect {
        /// Its pid inside.
        root: i32,
    },
    /// Send a signal to the root process. Answer: Done.
    Signal {
        /// The number.
        signal: i32,
    },
    /// End everything, PID 1 too. No answer but the end of the connection.
    Kill,
}

/// Answers and, for a watcher, events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How things are.
    Status(Status),
    /// The program runs.
    Started {
        /// Its pid inside.
        pid: i32,
    },
    /// Names of the attached descriptors, in order: `stdout`, `stderr`.
    Streams {
        /// The names.
        names: Vec<String>,
    },
    /// Done.
    Done,
    /// It could not be done.
    Failed(Report),
    /// Event: output of the program.
    Output {
        /// 1 or 2.
        stream: u8,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Event: the root process ended, and all its output was sent if that was wanted.
    Exited {
        /// How.
        status: ExitStatus,
    },
}

/// How a capsule is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`VERSION`].
    pub version: u16,
    /// The root process, its pid inside, once there is one.
    pub root: Option<i32>,
    /// How it ended.
    pub ended: Option<ExitStatus>,
    /// The streams that are pipes held by PID 1.
    pub streams: Vec<StreamIdentity>,
}

/// A standard stream as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamIdentity {
    /// `stdout` or `stderr`.
    pub name: String,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}
