//! Event counters: values, semaphore mode, flags, sharing with a child, and a blocked reader.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use crcoord_zoo::descriptors::{self, owned};
use crcoord_zoo::processes::{Child, End};
use crcoord_zoo::tasks::{await_blocked, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal};

pub fn run(stage: &Stage) -> Outcome {
    let plain = eventfd(7, libc::EFD_NONBLOCK)?;
    let semaphore = eventfd(
        3,
        libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK | libc::EFD_CLOEXEC,
    )?;
    let large = eventfd(0, 0)?;
    add(&large, u64::MAX - 1)?;
    let shared = eventfd(0, 0)?;
    let child = Child::spawn(stage, "child", |gate| {
        gate.open()?;
        stage.wait_for_go();
        add(&shared, 40)?;
        add(&shared, 2)?;
        Ok(0)
    })?;
    let blocking = Arc::new(eventfd(0, 0)?);
    let (its, tid) = (Arc::clone(&blocking), Arc::new(AtomicI32::new(0)));
    let its_tid = Arc::clone(&tid);
    let reader = thread::spawn(move || {
        its_tid.store(gettid(), Ordering::SeqCst);
        take(&its)
    });
    eventually("start of the reader", || tid.load(Ordering::SeqCst) != 0)?;
    await_blocked(
        std::process::id() as i32,
        tid.load(Ordering::SeqCst),
        &[libc::SYS_read],
    )?;
    stage.ready()?;
    stage.wait_for_go();

    ensure_equal!(take(&plain)?, 7, "counter");
    expect_empty(&plain)?;
    for round in 0..3 {
        ensure_equal!(take(&semaphore)?, 1, "semaphore, round {round}");
    }
    expect_empty(&semaphore)?;
    let flags = descriptors::control(&semaphore, libc::F_GETFD, 0).explain("F_GETFD")?;
    ensure_equal!(flags, libc::FD_CLOEXEC, "close-on-exec");
    let events = descriptors::poll(&large, libc::POLLOUT | libc::POLLIN, 0).explain("poll")?;
    ensure_equal!(
        events,
        libc::POLLIN,
        "events of a counter at its largest value"
    );
    ensure_equal!(take(&large)?, u64::MAX - 1, "largest value");
    child.expect(End::Exited(0))?;
    ensure_equal!(take(&shared)?, 42, "counter that a child has raised");
    ensure!(!reader.is_finished(), "the blocked reader returned early");
    add(&blocking, 5)?;
    let seen = reader
        .join()
        .unwrap_or_else(|_| Err(Failure::new("the reader panicked")))?;
    ensure_equal!(seen, 5, "value for the blocked reader");
    Ok(())
}

fn eventfd(value: u32, flags: i32) -> Outcome<OwnedFd> {
    // SAFETY: eventfd has no memory arguments.
    owned(unsafe { libc::eventfd(value, flags) }).explain("eventfd")
}

fn add(counter: &OwnedFd, value: u64) -> Outcome {
    descriptors::write_all(counter, &value.to_ne_bytes()).explain("write to an eventfd")
}

fn take(counter: &OwnedFd) -> Outcome<u64> {
    let bytes = descriptors::read(counter, 8).explain("read from an eventfd")?;
    let bytes = bytes
        .try_into()
        .ok()
        .explain("an eventfd did not give eight bytes")?;
    Ok(u64::from_ne_bytes(bytes))
}

fn expect_empty(counter: &OwnedFd) -> Outcome {
    let error = descriptors::read(counter, 8)
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_equal!(error, Some(libc::EAGAIN), "reading an empty counter");
    Ok(())
}
