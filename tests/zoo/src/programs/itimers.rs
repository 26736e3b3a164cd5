//! The three interval timers of a process: still armed, with a sane rest and their interval.

use crcoord_zoo::descriptors::checked;
use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::tasks::eventually;
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal};
use std::sync::atomic::{AtomicUsize, Ordering};

const TIMERS: [(i32, i32, i64, i64); 3] = [
    (libc::ITIMER_REAL, libc::SIGALRM, 10_000_000, 500),
    (libc::ITIMER_VIRTUAL, libc::SIGVTALRM, 20_000_000, 0),
    (libc::ITIMER_PROF, libc::SIGPROF, 30_000_000, 700),
];
/// A slept day is not a fault, a lost remainder is.
const SLACK: i64 = 86_400;
static FIRED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn fired(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    FIRED.fetch_add(1, Ordering::SeqCst);
}

pub fn run(stage: &Stage) -> Outcome {
    for (timer, signal, seconds, interval) in TIMERS {
        signals::handle(signal, fired, 0, &Signals::of(&[])).explain("sigaction")?;
        set(timer, (seconds, 250_000), interval)?;
    }
    stage.ready()?;
    stage.wait_for_go();
    for (timer, _, seconds, interval) in TIMERS {
        // SAFETY: all-zero is a valid itimerval.
        let mut now: libc::itimerval = unsafe { std::mem::zeroed() };
        // SAFETY: the value is valid for writing. The kind is an unsigned enum in some C libraries.
        checked(unsafe { libc::getitimer(timer as _, &mut now) }).explain("getitimer")?;
        let rest = now.it_value.tv_sec;
        ensure!(
            (seconds - SLACK..=seconds).contains(&rest),
            "timer {timer}: {rest} s remain"
        );
        ensure_equal!(
            now.it_interval.tv_sec,
            interval,
            "interval of timer {timer}"
        );
    }
    ensure_equal!(FIRED.load(Ordering::SeqCst), 0, "timers that went off");
    set(libc::ITIMER_REAL, (0, 1000), 0)?;
    eventually("a short timer", || FIRED.load(Ordering::SeqCst) == 1)
}

fn set(timer: i32, (seconds, microseconds): (i64, i64), interval: i64) -> Outcome {
    let new = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: interval,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: seconds,
            tv_usec: microseconds,
        },
    };
    // SAFETY: the new value is valid and the old one is not asked for.
    let result = unsafe { libc::setitimer(timer as _, &new, std::ptr::null_mut()) };
    checked(result)
        .explain(format!("setitimer {timer}"))
        .map(drop)
}
