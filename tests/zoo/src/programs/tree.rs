//! A process tree: pids, parents, groups and sessions stay, statuses and a zombie are kept for waitpid.

use crcoord_zoo::processes::{Child, End, Gate};
use crcoord_zoo::tasks::{self, eventually};
use crcoord_zoo::{Failure, Outcome, Stage, ensure, ensure_equal};

pub fn run(stage: &Stage) -> Outcome {
    let me = Identity::now();
    let plain = Child::spawn(stage, "plain child", |gate| with_grandchildren(stage, gate))?;
    let leader = Child::spawn(stage, "session leader", |gate| session(stage, gate))?;
    let group = Child::spawn(stage, "group leader", |gate| {
        // SAFETY: setpgid has no memory arguments.
        let result = unsafe { libc::setpgid(0, 0) };
        ensure_equal!(result, 0, "setpgid");
        settle(stage, gate)?;
        Ok(14)
    })?;
    let joined = Child::spawn(stage, "second of the group", |gate| {
        // SAFETY: setpgid has no memory arguments.
        let result = unsafe { libc::setpgid(0, group.pid()) };
        ensure_equal!(result, 0, "setpgid into the group of {}", group.pid());
        settle(stage, gate)?;
        Ok(15)
    })?;
    let zombie = Child::spawn(stage, "zombie", |gate| gate.open().map(|()| 33))?;
    eventually("the zombie", || zombie.ended_unreaped())?;
    let killed = Child::spawn(stage, "killed zombie", |gate| {
        gate.open()?;
        await_death()
    })?;
    killed.kill(libc::SIGKILL)?;
    eventually("the killed zombie", || killed.ended_unreaped())?;

    let seen_from_here = || {
        [&plain, &leader, &group, &joined].map(|child| {
            // SAFETY: both calls have no memory arguments.
            unsafe { (libc::getpgid(child.pid()), libc::getsid(child.pid())) }
        })
    };
    let before = seen_from_here();
    stage.ready()?;
    stage.work_until_go(|| {
        ensure!(
            zombie.ended_unreaped() && killed.ended_unreaped(),
            "a zombie is gone"
        );
        Ok(())
    })?;
    // The root's parent is the harness or the restarter: not part of the tree.
    let now = Identity {
        parent: me.parent,
        ..Identity::now()
    };
    ensure_equal!(now, me, "the root's ids");
    ensure_equal!(
        seen_from_here(),
        before,
        "groups and sessions of the children"
    );
    ensure_equal!(
        before[1],
        (leader.pid(), leader.pid()),
        "the session of the leader"
    );
    ensure_equal!(before[3].0, group.pid(), "the group of the second member");
    stage.note("root-has-looked")?;

    zombie.expect(End::Exited(33))?;
    killed.expect(End::Killed(libc::SIGKILL))?;
    plain.expect(End::Exited(12))?;
    leader.expect(End::Exited(13))?;
    group.expect(End::Exited(14))?;
    joined.expect(End::Exited(15))?;
    // SAFETY: waitpid may have no place for a status.
    let rest = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    ensure_equal!(rest, -1, "waitpid with no child left");
    Ok(())
}

/// Has two living children and a zombie of its own.
fn with_grandchildren(stage: &Stage, gate: &Gate<'_>) -> Outcome<u8> {
    let first = Child::spawn(stage, "first grandchild", |gate| {
        settle(stage, gate)?;
        Ok(21)
    })?;
    let second = Child::spawn(stage, "second grandchild", |gate| {
        gate.open()?;
        await_death()
    })?;
    let zombie = Child::spawn(stage, "zombie grandchild", |gate| gate.open().map(|()| 22))?;
    eventually("the zombie grandchild", || zombie.ended_unreaped())?;
    settle(stage, gate)?;
    second.kill(libc::SIGTERM)?;
    second.expect(End::Killed(libc::SIGTERM))?;
    first.expect(End::Exited(21))?;
    zombie.expect(End::Exited(22))?;
    Ok(12)
}

/// Leads a session with a member in a process group of its own.
fn session(stage: &Stage, gate: &Gate<'_>) -> Outcome<u8> {
    // SAFETY: setsid has no arguments.
    let session = unsafe { libc::setsid() };
    ensure_equal!(session, std::process::id() as i32, "setsid");
    let member = Child::spawn(stage, "member of the session", |gate| {
        // SAFETY: setpgid has no memory arguments.
        let result = unsafe { libc::setpgid(0, 0) };
        ensure_equal!(result, 0, "setpgid");
        settle(stage, gate)?;
        Ok(31)
    })?;
    settle(stage, gate)?;
    member.expect(End::Exited(31))?;
    Ok(13)
}

/// Opens the gate, waits until the root has looked at everybody, and checks its own ids.
fn settle(stage: &Stage, gate: &Gate<'_>) -> Outcome {
    let before = Identity::now();
    gate.open()?;
    stage.wait_for_go();
    ensure_equal!(
        Identity::now(),
        before,
        "pid, parent, group, session, thread"
    );
    stage.await_note("root-has-looked")
}

/// Waits for the signal that ends this process.
fn await_death() -> Outcome<u8> {
    let parent = Identity::now().parent;
    while Identity::now().parent == parent {
        tasks::pause_briefly();
    }
    Err(Failure::new("the parent is gone"))
}

/// What a process is called by.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    thread: i32,
}

impl Identity {
    fn now() -> Identity {
        // SAFETY: none of these calls has memory arguments or can fail.
        unsafe {
            Identity {
                pid: libc::getpid(),
                parent: libc::getppid(),
                group: libc::getpgrp(),
                session: libc::getsid(0),
                thread: libc::gettid(),
            }
        }
    }
}
