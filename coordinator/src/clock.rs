//! The machines' clock: CLOCK_BOOTTIME (time_namespaces(7), Linux 2.6.39), so that leases run on
//! while this host is suspended, as they do for the agents.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crcoord_protocol::Millis;
use rustix::time::{ClockId, clock_gettime};

/// Counts from its making.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Duration,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Clock { start: boot_time() }
    }

    pub(crate) fn now(&self) -> Millis {
        let elapsed = boot_time().saturating_sub(self.start);
        Millis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Seconds since 1970-01-01 UTC; 0 when the clock stands before that.
pub(crate) fn unix() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn boot_time() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}
