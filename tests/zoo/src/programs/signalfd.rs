//! Signal descriptors: mask and flags stay, and pending signals are read through them with their data.

use crcoord_zoo::descriptors::{self, checked, owned};
use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal};
use std::os::fd::{AsRawFd, OwnedFd};

pub fn run(stage: &Stage) -> Outcome {
    let (first, second) = (libc::SIGRTMIN() + 2, libc::SIGRTMIN() + 3);
    Signals::of(&[first, second, libc::SIGUSR1]).block();
    // SAFETY: the mask is valid.
    let descriptor = owned(unsafe {
        libc::signalfd(
            -1,
            Signals::of(&[first]).as_raw(),
            libc::SFD_NONBLOCK | libc::SFD_CLOEXEC,
        )
    })
    .explain("signalfd")?;
    let pid = std::process::id() as i32;
    for value in [71, 72] {
        signals::queue_to_process(pid, first, value).explain("sigqueue")?;
    }
    signals::queue_to_process(pid, second, 73).explain("sigqueue")?;
    stage.ready()?;
    stage.wait_for_go();

    ensure_equal!(take(&descriptor)?, (first, 71, pid), "first signal");
    ensure_equal!(take(&descriptor)?, (first, 72, pid), "second signal");
    ensure!(
        take(&descriptor).is_err(),
        "a signal outside of the mask was read"
    );
    let wider = Signals::of(&[first, second]);
    // SAFETY: the mask is valid; the descriptor's mask is replaced.
    checked(unsafe { libc::signalfd(descriptor.as_raw_fd(), wider.as_raw(), 0) })
        .explain("signalfd")?;
    ensure_equal!(
        take(&descriptor)?,
        (second, 73, pid),
        "signal of the wider mask"
    );
    Ok(())
}

/// Signal, value and sender.
fn take(descriptor: &OwnedFd) -> Outcome<(i32, i32, i32)> {
    let bytes = descriptors::read(descriptor, size_of::<libc::signalfd_siginfo>());
    let bytes = bytes.explain("read from the signalfd")?;
    let word = |at: usize| -> i32 {
        i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    ensure_equal!(bytes.len(), 128, "bytes of a signalfd_siginfo");
    // signalfd(2): ssi_signo at 0, ssi_pid at 12, ssi_int at 44.
    Ok((word(0), word(44), word(12)))
}
