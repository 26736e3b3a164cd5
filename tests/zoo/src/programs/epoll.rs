//! Epoll: registrations with their modes and data, nesting, pending and disabled events.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use crcoord_zoo::descriptors::{self, checked, owned};
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal};

const LEVEL: u64 = 0x1111_2222_3333_4444;
const EDGE: u64 = u64::MAX - 1;
const COUNTER: u64 = 3;
const ONE_SHOT: u64 = 4 << 40;
const WRITABLE: u64 = 5;
const NESTED: u64 = 0xAAAA_0000_0000_0001;
const LATER: u64 = 7;
const IN: u32 = libc::EPOLLIN as u32;

pub fn run(stage: &Stage) -> Outcome {
    let outer = create(0)?;
    let inner = create(libc::EPOLL_CLOEXEC)?;
    let (level, level_writer) = pipe()?;
    let (edge, edge_writer) = pipe()?;
    let (one_shot, one_shot_writer) = pipe()?;
    let (later, later_writer) = pipe()?;
    // SAFETY: eventfd has no memory arguments.
    let counter = owned(unsafe { libc::eventfd(2, libc::EFD_NONBLOCK) }).explain("eventfd")?;

    add(&outer, &level, IN, LEVEL)?;
    add(&outer, &edge, IN | libc::EPOLLET as u32, EDGE)?;
    add(&outer, &later, IN | libc::EPOLLET as u32, LATER)?;
    add(&outer, &one_shot, IN | libc::EPOLLONESHOT as u32, ONE_SHOT)?;
    add(&outer, &inner, IN, NESTED)?;
    add(&inner, &counter, IN, COUNTER)?;
    add(&inner, &level_writer, libc::EPOLLOUT as u32, WRITABLE)?;
    // The one-shot entry fires now and is disabled: its data stays unread without an event.
    write(&one_shot_writer)?;
    ensure!(
        events(&outer)?.contains_key(&ONE_SHOT),
        "the one-shot entry did not fire"
    );
    // Pending at the checkpoint, not yet reported: level, edge, nested.
    write(&level_writer)?;
    write(&edge_writer)?;
    let before = (registrations(&outer)?, registrations(&inner)?);
    stage.ready()?;
    stage.wait_for_go();

    ensure_equal!(
        (registrations(&outer)?, registrations(&inner)?),
        before,
        "registrations"
    );
    let flags = descriptors::control(&inner, libc::F_GETFD, 0).explain("F_GETFD")?;
    ensure_equal!(flags, libc::FD_CLOEXEC, "close-on-exec");
    let first = events(&outer)?;
    ensure_equal!(
        first,
        BTreeMap::from([(LEVEL, IN), (EDGE, IN), (NESTED, IN)]),
        "pending events"
    );
    let second = events(&outer)?;
    ensure_equal!(
        second,
        BTreeMap::from([(LEVEL, IN), (NESTED, IN)]),
        "events after an edge"
    );
    let out = libc::EPOLLOUT as u32;
    ensure_equal!(
        events(&inner)?,
        BTreeMap::from([(COUNTER, IN), (WRITABLE, out)]),
        "inner events"
    );

    write(&later_writer)?;
    write(&edge_writer)?;
    let third = events(&outer)?;
    ensure!(
        third.contains_key(&LATER) && third.contains_key(&EDGE),
        "new edges: {third:x?}"
    );
    control(&outer, libc::EPOLL_CTL_MOD, &one_shot, IN, ONE_SHOT + 1)?;
    ensure!(
        events(&outer)?.contains_key(&(ONE_SHOT + 1)),
        "the one-shot entry cannot be rearmed"
    );
    control(&outer, libc::EPOLL_CTL_DEL, &level, 0, 0)?;
    ensure!(
        !events(&outer)?.contains_key(&LEVEL),
        "a removed entry still fires"
    );
    descriptors::read(&counter, 8).explain("eventfd")?;
    control(&inner, libc::EPOLL_CTL_DEL, &level_writer, 0, 0)?;
    ensure!(
        !events(&outer)?.contains_key(&NESTED),
        "the nested epoll is never quiet"
    );
    Ok(())
}

fn create(flags: i32) -> Outcome<OwnedFd> {
    // SAFETY: epoll_create1 has no memory arguments.
    owned(unsafe { libc::epoll_create1(flags) }).explain("epoll_create1")
}

fn add(epoll: &OwnedFd, target: &OwnedFd, events: u32, data: u64) -> Outcome {
    control(epoll, libc::EPOLL_CTL_ADD, target, events, data)
}

fn control(epoll: &OwnedFd, command: i32, target: &OwnedFd, events: u32, data: u64) -> Outcome {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event is valid for the call.
    let result =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), command, target.as_raw_fd(), &mut event) };
    checked(result)
        .explain(format!("epoll_ctl {command}"))
        .map(drop)
}

/// What is ready now, by data.
fn events(epoll: &OwnedFd) -> Outcome<BTreeMap<u64, u32>> {
    let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 16];
    // SAFETY: the array has sixteen entries.
    let count = unsafe { libc::epoll_wait(epoll.as_raw_fd(), ready.as_mut_ptr(), 16, 0) };
    let count = checked(count).explain("epoll_wait")? as usize;
    Ok(ready[..count]
        .iter()
        .map(|event| (event.u64, event.events))
        .collect())
}

/// The entries as the kernel lists them: target, events and data (proc(5), fdinfo of an epoll).
fn registrations(epoll: &OwnedFd) -> Outcome<Vec<String>> {
    let path = format!("/proc/self/fdinfo/{}", epoll.as_raw_fd());
    let text = fs::read_to_string(&path).explain(&path)?;
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| line.starts_with("tfd:"))
        // Position, inode and device of the target follow: they may change.
        .map(|line| {
            line.split_whitespace()
                .take(6)
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    lines.sort();
    Ok(lines)
}

fn pipe() -> Outcome<(OwnedFd, OwnedFd)> {
    descriptors::pipe(libc::O_NONBLOCK).explain("pipe2")
}

fn write(end: &OwnedFd) -> Outcome {
    descriptors::write_all(end, b"x").explain("write")
}
