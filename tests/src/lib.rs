//! What the end-to-end tests share: namespaces to run programs in, the engine's commands, and the
//! zoo's programs as specimens.
//!
//! Every test runs its programs in PID, mount and network namespaces of its own ([`Sandbox`]), so that
//! tests run side by side and leave nothing behind. This needs root; without it a test fails and
//! says so. Helpers panic: a test that cannot go on has failed.
#![forbid(unsafe_code)]

pub mod binaries;
pub mod cluster;
pub mod cluster_phase;
pub mod cluster_work;
pub mod engine;
pub mod random;
pub mod sandbox;
pub mod specimen;

pub use engine::{DumpOptions, Ended};
pub use random::Random;
pub use sandbox::{Program, Sandbox};
pub use specimen::Specimen;

use std::time::{Duration, Instant};

/// How long a test waits for something that must happen, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds.
///
/// # Panics
/// It does not hold within [`PATIENCE`].
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
