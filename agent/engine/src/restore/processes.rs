//! Processes and threads: made with their ids, sessions and groups; finished with everything the
//! kernel keeps of them.

use std::os::fd::{AsFd, AsRawFd};

use crcoord_common::wire::engine::RestoreTarget;
use crcoord_kernel::number::{SYS_EXIT_GROUP, SYS_KILL, SYS_SETNS, SYS_SETPGID, SYS_SETSID};
use crcoord_kernel::stub::{Area, Call, Stub, StubError};

use super::address_space::lock_memory;
use super::image::Image;
use super::{Capsule, Stubs, THREAD_FLAGS};
use crate::EngineError;
use crate::error::{Result, bad_image, failure, obstacle};
use crate::resources::process::ProcessImage;

const EEXIST: i32 = 17;
const EPERM: i32 = 1;
/// All signals but SIGTRAP, by which the builder's calls end.
const BUILD_MASK: u64 = !(1 << 4);

/// Makes all processes of the image, each with its own pid, as children of the capsule's PID 1.
pub fn create(
    image: &Image,
    area: &Area,
    capsule: Option<&Capsule>,
    target: &RestoreTarget,
    stubs: &mut Stubs,
) -> Result<()> {
    let helper = fork_helper(image, area)?;
    let made = make_roots(image, &helper, capsule, target, stubs);
    // The helper's end makes the roots children of PID 1.
    let ended = helper.end_by(&Call::new(SYS_EXIT_GROUP, [0]));
    made?;
    ended?;
    set_groups(image, stubs)
}

fn make_roots(
    image: &Image,
    helper: &Stub,
    capsule: Option<&Capsule>,
    target: &RestoreTarget,
    stubs: &mut Stubs,
) -> Result<()> {
    block_signals(helper)?;
    if let Some(capsule) = capsule {
        for namespace in &capsule.namespaces {
            let fd = namespace.as_fd().as_raw_fd() as u64;
            helper.call(SYS_SETNS, [fd, 0])?;
        }
        // Away from the agent's session and terminal. Without a capsule the caller's session takes
        // the place of the one outside the tree.
        helper.call::<0>(SYS_SETSID, [])?;
    }
    if let Some(cgroup) = &target.cgroup {
        std::fs::write(format!("{cgroup}/cgroup.procs"), helper.tid().to_string())
            .map_err(|error| failure("entering the cgroup", &error).path(cgroup.clone()))?;
    }
    for root in image.children(0) {
        make(image, helper, root, 0, stubs)?;
    }
    Ok(())
}

/// A process between the engine and the tree's roots, with a pid that the image does not use.
fn fork_helper(image: &Image, area: &Area) -> Result<Stub> {
    const FIRST: i32 = 30_000;
    const TRIES: i32 = 2_000;
    let used = |pid: &i32| {
        image.processes.contains_key(pid)
            || image
                .threads
                .values()
                .flat_map(|all| &all.threads)
                .any(|thread| thread.tid == *pid)
    };
    for pid in (FIRST..FIRST + TRIES).filter(|pid| !used(pid)) {
        match area.fork(pid) {
            Ok(stub) => return Ok(stub),
            Err(StubError::Trace { error, .. }) if error.raw_os_error() == Some(EEXIST) => {}
            Err(StubError::Trace { error, .. }) if error.raw_os_error() == Some(EPERM) => {
                return Err(not_permitted().into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(obstacle("engine-no-pid", "no pid is free for building").into())
}

fn not_permitted() -> crcoord_common::report::Report {
    obstacle("engine-set-tid", "processes may not be given their pids")
        .remedy("run crcoord as root with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN")
        .errno(Some(EPERM))
}

/// Makes a process and then its children. A child that is in the session its parent was born into,
/// though the parent has one of its own by now, was forked before the parent's setsid(2).
fn make(
    image: &Image,
    parent: &Stub,
    process: &ProcessImage,
    born_session: i32,
    stubs: &mut Stubs,
) -> Result<()> {
    let pid = process.pid;
    let stub = parent
        .clone(0, process.exit_signal, pid)
        .map_err(|error| in_use(error, pid))?;
    block_signals(&stub)?;
    let leads = process.session == pid;
    if leads {
        for child in image
            .children(pid)
            .filter(|child| child.session == born_session)
        {
            make(image, &stub, child, born_session, stubs)?;
        }
        stub.call::<0>(SYS_SETSID, [])?;
    } else if process.session != born_session {
        return Err(bad_image(format!("process {pid} cannot have got into its session")).into());
    }
    let session = if leads { pid } else { born_session };
    let rest = image
        .children(pid)
        .filter(|child| !leads || child.session != born_session);
    for child in rest {
        make(image, &stub, child, session, stubs)?;
    }
    stubs.main.insert(pid, stub);
    Ok(())
}

fn in_use(error: StubError, pid: i32) -> EngineError {
    match &error {
        StubError::Call { error, .. } if error.raw_os_error() == Some(EEXIST) => {
            obstacle("engine-pid-in-use", format!("pid {pid} is in use"))
                .pid(pid)
                .remedy(
                    "restore into a PID namespace of its own, or end that process and all of its \
                     group and session",
                )
                .into()
        }
        StubError::Call { error, .. } if error.raw_os_error() == Some(EPERM) => {
            not_permitted().into()
        }
        _ => error.into(),
    }
}

fn block_signals(stub: &Stub) -> Result<()> {
    stub.tracee()
        .set_signal_mask(BUILD_MASK)
        .map_err(|error| failure("blocking signals of a stub", &error).into())
}

fn set_groups(image: &Image, stubs: &Stubs) -> Result<()> {
    let not_session_leaders = || image.processes.values().filter(|p| p.session != p.pid);
    let leaders = not_session_leaders().filter(|process| process.group == process.pid);
    let members =
        not_session_leaders().filter(|process| process.group != process.pid && process.group != 0);
    for process in leaders.chain(members) {
        if let Some(stub) = stubs.main.get(&process.pid) {
            stub.call(SYS_SETPGID, [0, process.group as u64])?;
        }
    }
    Ok(())
}

/// Ends processes that were zombies, with the status their parents are to find.
pub fn end_zombies(image: &Image, stubs: &mut Stubs) -> Result<()> {
    for process in image.processes.values() {
        let Some(status) = process.zombie else {
            continue;
        };
        let Some(stub) = stubs.main.remove(&process.pid) else {
            continue;
        };
        let signal = status & 0x7f;
        if signal == 0 {
            stub.end_by(&Call::new(SYS_EXIT_GROUP, [(status as u64 >> 8) & 0xff]))?;
        } else {
            // SIGKILL alone ends a process whatever is blocked; others need to be let through.
            stub.tracee()
                .set_signal_mask(0)
                .map_err(|error| failure("unblocking signals of a stub", &error))?;
            stub.end_by_signal(process.pid, signal)?;
        }
    }
    Ok(())
}

/// Gives a filled process its threads and all they have, up to registers.
pub fn finish(image: &Image, pid: i32, stubs: &mut Stubs, target: &RestoreTarget) -> Result<()> {
    let missing = || bad_image(format!("process {pid} is incomplete"));
    let process = image.processes.get(&pid).ok_or_else(missing)?;
    let threads = image.threads.get(&pid).ok_or_else(missing)?;
    let signals = image.signals.get(&pid).ok_or_else(missing)?;
    let space = image.spaces.get(&pid).ok_or_else(missing)?;
    let (main_image, others) = threads.threads.split_first().ok_or_else(missing)?;
    let main = stubs.main.get(&pid).ok_or_else(missing)?;
    let mut made = Vec::new();
    for thread in others {
        let stub = main
            .clone(THREAD_FLAGS, 0, thread.tid)
            .map_err(|error| in_use(error, thread.tid))?;
        block_signals(&stub)?;
        made.push((thread, stub));
    }
    lock_memory(space, main)?;
    main_image.restore(main)?;
    for (thread, stub) in &made {
        thread.restore(stub)?;
    }
    signals.restore(main)?;
    signals.restore_pending(main)?;
    main_image.restore_pending(main, pid)?;
    for (thread, stub) in &made {
        thread.restore_pending(stub, pid)?;
    }
    if let Some(timers) = image.timers.get(&pid) {
        timers.restore(main)?;
    }
    process.restore_limits(main)?;
    main_image
        .credentials
        .check_bounds(target.owner.as_ref(), pid)?;
    for (thread, stub) in &made {
        thread.credentials.restore(stub)?;
    }
    main_image.credentials.restore(main)?;
    for (thread, stub) in &made {
        thread.restore_priority(stub)?;
    }
    main_image.restore_priority(main)?;
    process.restore_late(main)?;
    main.set_untraced_flags(&main_image.decoded_registers()?)?;
    for (thread, stub) in &made {
        stub.set_untraced_flags(&thread.decoded_registers()?)?;
    }
    for (thread, stub) in made {
        stubs.threads.insert((pid, thread.tid), stub);
    }
    Ok(())
}

/// Gives every thread of a process its registers, extended state and signal mask.
pub fn set_registers(image: &Image, pid: i32, stubs: &Stubs) -> Result<()> {
    let Some(threads) = image.threads.get(&pid) else {
        return Ok(());
    };
    for thread in &threads.threads {
        let stub = if thread.tid == pid {
            stubs.main.get(&pid)
        } else {
            stubs.threads.get(&(pid, thread.tid))
        };
        let stub = stub.ok_or_else(|| bad_image(format!("thread {} is missing", thread.tid)))?;
        let tracee = stub.tracee();
        tracee
            .set_extended_state(&thread.extended)
            .map_err(|error| {
                obstacle(
                    "engine-cpu",
                    format!("the CPU does not take the thread's state: {error}"),
                )
                .tid(thread.tid)
                .remedy("restart on a node with the same CPU features")
            })?;
        tracee
            .set_registers(&thread.decoded_registers()?)
            .and_then(|()| tracee.set_signal_mask(thread.mask))
            .map_err(|error| failure("setting registers", &error).tid(thread.tid))?;
    }
    Ok(())
}

/// How a zombie ends by a signal: it sends it to itself.
trait EndBySignal {
    fn end_by_signal(&self, pid: i32, signal: i32) -> Result<()>;
}

impl EndBySignal for Stub {
    fn end_by_signal(&self, pid: i32, signal: i32) -> Result<()> {
        self.end_by_delivering(&Call::new(SYS_KILL, [pid as u64, signal as u64]), signal)
            .map(drop)
            .map_err(EngineError::from)
    }
}
