//! `Settings`: every bound and choice of the machines, with defaults.

use crcoord_common::ids::ClusterName;

use crate::addresses::Pool;

/// Bounds and choices. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// The cluster: part of every job's identity.
    pub cluster: ClusterName,
    /// How often agents report.
    pub heartbeat_ms: u64,
    /// A silent agent counts as lost after this long.
    pub heartbeat_timeout_ms: u64,
    /// A held member thaws by itself after this long without renewal.
    pub hold_lease_ms: u64,
    /// Longest time from the first hold order to the release, renewals included.
    pub hold_maximum_ms: u64,
    /// Start, preflight, kill, resume and other small requests are answered within this time.
    pub answer_ms: u64,
    /// A capture is answered within this time.
    pub capture_ms: u64,
    /// A released member shows progress or seals within this time.
    pub seal_ms: u64,
    /// A member that is being built shows progress or is built within this time.
    pub build_ms: u64,
    /// Added to a run lease before it counts as run out: time for the capsule to end itself.
    pub run_lease_margin_ms: u64,
    /// Committed epochs kept per job, at least 1.
    pub keep_epochs: u32,
    /// Copies of each part on other nodes: 0 or 1.
    pub copies: u32,
    /// Each part also goes to the shared directory.
    pub shared: bool,
    /// Virtual addresses of members.
    pub pool: Pool,
}

impl Settings {
    /// The defaults, for this cluster.
    pub fn new(cluster: ClusterName) -> Self {
        Settings {
            cluster,
            heartbeat_ms: 1_000,
            heartbeat_timeout_ms: 5_000,
            hold_lease_ms: 10_000,
            hold_maximum_ms: 60_000,
            answer_ms: 30_000,
            capture_ms: 60_000,
            seal_ms: 120_000,
            build_ms: 120_000,
            run_lease_margin_ms: 5_000,
            keep_epochs: 2,
            copies: 1,
            shared: false,
            pool: Pool::default(),
        }
    }
}
