//! The run lease: a timer on CLOCK_BOOTTIME, which also counts while the node sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_gettime, timerfd_settime,
};

/// A running lease. Its descriptor is readable once it has run out.
#[derive(Debug)]
pub(super) struct Lease {
    timer: OwnedFd,
}

impl Lease {
    /// A lease of this many milliseconds from now.
    pub fn start(milliseconds: u64) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let lease = Lease {
            timer: timerfd_create(TimerfdClockId::Boottime, flags)?,
        };
        lease.renew(milliseconds)?;
        Ok(lease)
    }

    /// Sets its end anew.
    pub fn renew(&self, milliseconds: u64) -> io::Result<()> {
        // 0 would disarm the timer.
        let milliseconds = milliseconds.max(1).min(i64::MAX as u64);
        let setting = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: (milliseconds / 1000).cast_signed(),
                tv_nsec: (milliseconds % 1000 * 1_000_000).cast_signed(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        Ok(())
    }

    /// True when it has run out: asked of the clock, so a renewal that came first wins.
    pub fn over(&self) -> io::Result<bool> {
        let left = timerfd_gettime(&self.timer)?.it_value;
        Ok(left.tv_sec == 0 && left.tv_nsec == 0)
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn a_lease_ends_and_a_renewed_one_does_not() {
        let lease = Lease::start(20).unwrap();
        let other = Lease::start(20).unwrap();
        other.renew(3_600_000).unwrap();
        poll(&mut [PollFd::new(&lease, PollFlags::IN)], None).unwrap();
        assert!(lease.over().unwrap());
        assert!(!other.over().unwrap());
    }
}
