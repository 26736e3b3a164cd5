//! The table of descriptors and objects at the front of every manifest: what a job holds, readable
//! without decoding any record, and what substitution at restart refers to.

use serde::{Deserialize, Serialize};

use crate::ids::ObjectId;

/// What kind of kernel object an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectKind {
    /// A process's private memory.
    PrivateMemory,
    /// Memory shared between processes without a file.
    SharedMemory,
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A character device.
    CharDevice,
    /// A pipe or fifo.
    Pipe,
    /// An eventfd.
    Eventfd,
    /// An epoll instance.
    Epoll,
    /// A TCP socket.
    Tcp,
    /// A unix socket.
    Unix,
    /// A timerfd.
    Timerfd,
    /// A signalfd.
    Signalfd,
    /// Left out at checkpoint, replaced at restart.
    LeftOut,
    /// Any other kind; its record says which.
    Other,
}

/// One object and who holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectEntry {
    /// Unique in this manifest.
    pub id: ObjectId,
    /// What it is.
    pub kind: ObjectKind,
    /// Its path, address or the kernel's name for it.
    pub path: String,
    /// Open flags (`open(2)`), 0 where that means nothing.
    pub flags: u32,
    /// Owner (uid, gid) of the object, where it has one.
    pub owner: Option<(u32, u32)>,
    /// Permission bits, where it has them.
    pub mode: Option<u32>,
    /// The descriptors that refer to it: (pid inside the job, descriptor).
    pub descriptors: Vec<(i32, i32)>,
}
