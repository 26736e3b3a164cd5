//! Timer descriptors: armed far ahead, periodic, expired but unread, disarmed.

use std::os::fd::{AsRawFd, OwnedFd};

use crcoord_zoo::descriptors::{self, checked, owned};
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal};

const FAR: i64 = 10_000_000;
/// A slept day is not a fault, a lost remainder is.
const SLACK: i64 = 86_400;
const INTERVAL: i64 = 5000;

pub fn run(stage: &Stage) -> Outcome {
    let far = create(libc::CLOCK_MONOTONIC)?;
    let periodic = create(libc::CLOCK_BOOTTIME)?;
    let expired = create(libc::CLOCK_MONOTONIC)?;
    let disarmed = create(libc::CLOCK_REALTIME)?;
    set(&far, (FAR, 0), 0)?;
    set(&periodic, (FAR, 0), INTERVAL)?;
    set(&expired, (0, 1), INTERVAL)?;
    let events = descriptors::poll(&expired, libc::POLLIN, -1).explain("poll")?;
    ensure_equal!(events, libc::POLLIN, "events of the expired timer");
    stage.ready()?;
    stage.wait_for_go();

    for (timer, interval) in [(&far, 0), (&periodic, INTERVAL)] {
        let now = get(timer)?;
        let rest = now.it_value.tv_sec;
        ensure!(
            (FAR - SLACK..=FAR).contains(&rest),
            "{rest} s of {FAR} s remain"
        );
        ensure_equal!(now.it_interval.tv_sec, interval, "interval");
        let error = descriptors::read(timer, 8)
            .err()
            .and_then(|error| error.raw_os_error());
        ensure_equal!(
            error,
            Some(libc::EAGAIN),
            "reading a timer that has not expired"
        );
    }
    let count = descriptors::read(&expired, 8).explain("the expiration was lost")?;
    ensure!(
        count.len() == 8 && count[..4] != [0; 4],
        "expirations: {count:?}"
    );
    ensure_equal!(
        get(&expired)?.it_interval.tv_sec,
        INTERVAL,
        "interval of the expired timer"
    );
    ensure_equal!(
        get(&disarmed)?.it_value.tv_sec,
        0,
        "rest of the disarmed timer"
    );
    set(&far, (0, 1), 0)?;
    descriptors::poll(&far, libc::POLLIN, -1).explain("poll")?;
    ensure_equal!(
        descriptors::read(&far, 8).explain("read")?.len(),
        8,
        "a new expiration"
    );
    Ok(())
}

fn create(clock: i32) -> Outcome<OwnedFd> {
    // SAFETY: timerfd_create has no memory arguments.
    owned(unsafe { libc::timerfd_create(clock, libc::TFD_NONBLOCK) }).explain("timerfd_create")
}

fn set(timer: &OwnedFd, (seconds, nanoseconds): (i64, i64), interval: i64) -> Outcome {
    let new = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: interval,
            tv_nsec: 0,
        },
        it_value: libc::timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
    };
    // SAFETY: the new value is valid, the old one is not asked for.
    let result = unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &new, std::ptr::null_mut()) };
    checked(result).explain("timerfd_settime").map(drop)
}

fn get(timer: &OwnedFd) -> Outcome<libc::itimerspec> {
    // SAFETY: all-zero is a valid itimerspec.
    let mut now: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: the value is valid for writing.
    checked(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &mut now) })
        .explain("timerfd_gettime")?;
    Ok(now)
}
