//! `Settings`: everything the daemon is configured with; the command line maps the configuration
//! file to it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use crcoord_common::ids::ClusterName;
use crcoord_protocol::Pool;
use crcoord_transport::IdentityPaths;

/// The daemon's settings. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster; must be the one of the certificate.
    pub cluster: ClusterName,
    /// UDP address for agents; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Unix socket for commands.
    pub socket: PathBuf,
    /// Directory of the journal.
    pub state_dir: PathBuf,
    /// Certificate, key and authority.
    pub identity: IdentityPaths,
    /// Uids besides root that may act on every job.
    pub operators: Vec<u32>,
    /// How often agents report.
    pub heartbeat_ms: u64,
    /// A silent agent counts as lost after this long.
    pub heartbeat_timeout_ms: u64,
    /// A held member thaws by itself after this long without renewal.
    pub hold_lease_ms: u64,
    /// Longest hold of a checkpoint, renewals included.
    pub hold_maximum_ms: u64,
    /// Start, preflight, kill, resume are answered within this time.
    pub answer_ms: u64,
    /// A capture is answered within this time.
    pub capture_ms: u64,
    /// A released member shows progress or seals within this time.
    pub seal_ms: u64,
    /// A member being built shows progress or is built within this time.
    pub build_ms: u64,
    /// Added to a run lease before it counts as run out: time for the capsule to end itself.
    pub run_lease_margin_ms: u64,
    /// Committed epochs kept per job, at least 1.
    pub keep_epochs: u32,
    /// Copies of each part on other nodes: 0 or 1.
    pub copies: u32,
    /// Each part also goes to the shared directory of the agents' configuration.
    pub shared: bool,
    /// Virtual addresses of members.
    pub pool: Pool,
}

impl Default for Settings {
    fn default() -> Self {
        let cluster: ClusterName = "cluster"
            .parse()
            .expect("the constant consists of allowed characters");
        let machine = crcoord_protocol::Settings::new(cluster.clone());
        Settings {
            cluster,
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7117)),
            socket: "/run/crcoord/coordinator.sock".into(),
            state_dir: "/var/lib/crcoord".into(),
            identity: IdentityPaths {
                certificate: "/etc/crcoord/pki/coordinator-coordinator.pem".into(),
                key: "/etc/crcoord/pki/coordinator-coordinator.key".into(),
                authority: "/etc/crcoord/pki/ca.pem".into(),
            },
            operators: Vec::new(),
            heartbeat_ms: machine.heartbeat_ms,
            heartbeat_timeout_ms: machine.heartbeat_timeout_ms,
            hold_lease_ms: machine.hold_lease_ms,
            hold_maximum_ms: machine.hold_maximum_ms,
            answer_ms: machine.answer_ms,
            capture_ms: machine.capture_ms,
            seal_ms: machine.seal_ms,
            build_ms: machine.build_ms,
            run_lease_margin_ms: machine.run_lease_margin_ms,
            keep_epochs: machine.keep_epochs,
            copies: machine.copies,
            shared: machine.shared,
            pool: machine.pool,
        }
    }
}

impl Settings {
    /// What is wrong with the settings, if anything: the first field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let rules = [
            (self.heartbeat_ms > 0, "heartbeat", "must be above 0"),
            (
                self.heartbeat_timeout_ms >= 2 * self.heartbeat_ms,
                "lost_after",
                "must be at least two heartbeats",
            ),
            (
                self.hold_lease_ms >= 100,
                "hold_lease",
                "must be at least 100 ms",
            ),
            (
                self.hold_maximum_ms >= self.hold_lease_ms,
                "hold_limit",
                "must be at least the hold lease",
            ),
            (self.keep_epochs > 0, "epochs", "must be at least 1"),
            (self.copies <= 1, "copies", "must be 0 or 1"),
        ];
        match rules.into_iter().find(|(kept, ..)| !kept) {
            Some((_, name, why)) => Err((name, why)),
            None => Ok(()),
        }
    }

    pub(crate) fn machine(&self) -> crcoord_protocol::Settings {
        crcoord_protocol::Settings {
            cluster: self.cluster.clone(),
            heartbeat_ms: self.heartbeat_ms,
            heartbeat_timeout_ms: self.heartbeat_timeout_ms,
            hold_lease_ms: self.hold_lease_ms,
            hold_maximum_ms: self.hold_maximum_ms,
            answer_ms: self.answer_ms,
            capture_ms: self.capture_ms,
            seal_ms: self.seal_ms,
            build_ms: self.build_ms,
            run_lease_margin_ms: self.run_lease_margin_ms,
            keep_epochs: self.keep_epochs,
            copies: self.copies,
            shared: self.shared,
            pool: self.pool,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_a_short_hold_is_not() {
        let settings = Settings::default();
        settings.check().unwrap();
        let short = Settings {
            hold_lease_ms: 99,
            ..settings
        };
        assert_eq!(short.check().unwrap_err().0, "hold_lease");
    }
}
