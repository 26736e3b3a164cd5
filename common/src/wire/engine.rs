//! Agent and engine process over a socketpair (descriptor 3 of the engine), with page bytes in a
//! shared-memory ring of window-sized slots (descriptor 4). End of file on the socket means that the
//! other side is gone: an engine then lets its tree run on, or kills what it has half built.

use serde::{Deserialize, Serialize};

use super::control::{CaptureOptions, CaptureSummary, Preflight};
use super::member::{Owner, TcpEnd};
use crate::image::{ManifestBody, PageRun};
use crate::report::Report;

/// Slots in the ring; each has [`crate::image::WINDOW_BYTES`].
pub const RING_SLOTS: u32 = 256;

/// Which processes form a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// This process and all its descendants.
    Tree(i32),
    /// All descendants of this capsule's PID 1, which itself is not part of the tree.
    Capsule(i32),
}

/// An object that is left out of the image and replaced at restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// `st_dev` of the object.
    pub device: u64,
    /// `st_ino` of the object.
    pub inode: u64,
    /// What stands in for it at restart: `stdin`, `stdout` or `stderr`.
    pub name: String,
}

/// What to capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureTarget {
    /// The tree.
    pub scope: Scope,
    /// Its network is a namespace of its own, so all of it can be locked.
    pub own_network: bool,
    /// What is left out.
    pub left_out: Vec<LeftOut>,
    /// Choices of the request.
    pub options: CaptureOptions,
}

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreTarget {
    /// The capsule's PID 1 whose namespaces the tree is built in; `None`: the caller's own.
    pub capsule: Option<i32>,
    /// True: the capsule has a network namespace of its own.
    pub own_network: bool,
    /// The image without its pages.
    pub body: ManifestBody,
    /// No restored credential may exceed these; `None` for root's stand-alone use.
    pub owner: Option<Owner>,
    /// Replacements for what was left out: name and the engine's descriptor for it.
    pub substitutions: Vec<(String, i32)>,
    /// All ends of established connections of the whole job at the cut.
    pub connections: Vec<TcpEnd>,
    /// Old address -> new address.
    pub addresses: Vec<(std::net::IpAddr, std::net::IpAddr)>,
    /// The cgroup (v2 directory or v1 freezer directory) for the tree; `None`: the engine's.
    pub cgroup: Option<String>,
}

/// A filled slot of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its index.
    pub slot: u32,
    /// What it holds.
    pub run: PageRun,
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToEngine {
    /// First message to a capturing engine. Answer: Preflighted.
    Preflight(CaptureTarget),
    /// Lock and freeze. Answer: Held.
    Hold,
    /// Take the state. Answer: Captured.
    Capture,
    /// Thaw and unlock. Answer: Released; then Pages until Body.
    Release,
    /// Thaw, unlock, forget. Answer: Done; the engine ends.
    Abort,
    /// After a capture, instead of Release: end the tree with its sockets in repair mode once all
    /// pages are read. Answer: Released, Pages until Body; the tree is gone before Body.
    Finish,
    /// Slots that may be used again (capture), in any order.
    Free(Vec<u32>),
    /// First message to a restoring engine. Answer: Ready, when the trees wait for their pages.
    Restore(Box<RestoreTarget>),
    /// Filled slots (restore). Each is answered by Freed.
    Fill(Vec<Slot>),
    /// All pages were sent. Answer: Built.
    Filled,
    /// Let the built tree run. Answer: Resumed; the engine ends.
    Resume,
}

/// From the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromEngine {
    /// What a preflight found.
    Preflighted(Preflight),
    /// Frozen, and the network lock is in force.
    Held {
        /// How long freezing took, in microseconds.
        freeze_us: u64,
    },
    /// State is taken.
    Captured(CaptureSummary),
    /// The tree runs again.
    Released {
        /// How long it did not run, in microseconds.
        frozen_us: u64,
    },
    /// Filled slots (capture).
    Pages(Vec<Slot>),
    /// All pages were sent; the manifest without page index roots.
    Body(Box<ManifestBody>),
    /// The tree's processes exist and wait for their pages.
    Ready,
    /// Slots that may be used again (restore).
    Freed(Vec<u32>),
    /// Everything stands before the first instruction.
    Built {
        /// Root process in the capsule's PID namespace.
        root: i32,
        /// Bytes filled.
        filled_bytes: u64,
    },
    /// The tree runs.
    Resumed,
    /// Done, nothing to tell.
    Done,
    /// It could not be done; the tree is as it was before (capture) or gone (restore).
    Failed(Vec<Report>),
}
