//! Fault injection for tests: the process kills itself at the n-th traced stop, so that every stop
//! of an engine can be shown to be a safe place to die. Off unless the environment asks for it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Name of the variable with the number of the stop, counted from 1.
pub const VARIABLE: &str = "CRCOORD_FAULT_KILL_AT_STOP";

/// Counts one stop.
pub(crate) fn point() {
    static AT: OnceLock<u64> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let at = *AT.get_or_init(|| {
        std::env::var(VARIABLE)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    });
    if at != 0 && COUNT.fetch_add(1, Ordering::Relaxed) + 1 == at {
        // SAFETY: kills this very process; nothing runs afterwards.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}
