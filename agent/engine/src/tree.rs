//! The process tree: who belongs to it, and holding all of it still.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use crcoord_common::report::Report;
use crcoord_common::wire::engine::Scope;
use crcoord_kernel::inject;
use crcoord_kernel::proc::{self, Status};
use crcoord_kernel::ptrace::{HOLD_OPTIONS, Stop, Tracee, event};
use crcoord_kernel::sys::{Compare, kcmp};

use crate::error::{Result, failure, obstacle};

/// How long a thread may take to stop. A longer wait means that it sits in the kernel (state D).
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// One process of a held tree.
#[derive(Debug)]
pub struct HeldProcess {
    /// Its pid in the engine's namespace.
    pub pid: i32,
    /// Its threads, the main thread first; empty for a zombie.
    pub threads: Vec<Tracee>,
}

/// A tree of which no thread runs. Dropping it lets all of them run on.
#[derive(Debug)]
pub struct HeldTree {
    /// All processes, parents before children.
    pub processes: Vec<HeldProcess>,
    /// When the first thread was asked to stop.
    pub since: Instant,
}

/// All processes of the scope, parents before children. Exact only when they are stopped.
pub fn discover(scope: Scope) -> io::Result<Vec<i32>> {
    let mut all = match scope {
        Scope::Tree(root) => vec![root],
        Scope::Capsule(init) => proc::children(init)?,
    };
    let mut next = 0;
    while next < all.len() {
        match proc::children(all[next]) {
            Ok(children) => all.extend(children),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
        next += 1;
    }
    all.dedup();
    Ok(all)
}

/// True for the errors that /proc and ptrace give about a task that has ended.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc_errno::ENOENT | libc_errno::ESRCH)
    )
}

mod libc_errno {
    pub const ENOENT: i32 = 2;
    pub const ESRCH: i32 = 3;
    pub const EPERM: i32 = 1;
}

impl HeldTree {
    /// Stops every thread of every process of the scope. Processes that are born meanwhile are
    /// attached by the kernel before they run.
    pub fn hold(scope: Scope) -> Result<HeldTree> {
        let since = Instant::now();
        let mut held = Holding {
            threads: BTreeMap::new(),
            since,
        };
        loop {
            let pids = discover(scope).map_err(|error| failure("listing the tree", &error))?;
            let (fresh, unfinished) = held.seize_all(&pids)?;
            held.wait_all(&fresh)?;
            if fresh.is_empty() && !unfinished {
                return held.into_tree(&pids);
            }
            if unfinished && since.elapsed() > STOP_LIMIT {
                return Err(obstacle(
                    "engine-vfork",
                    "a process between vfork and exec does not get on",
                )
                .remedy("try again later")
                .into());
            }
        }
    }

    /// Lets everything run on.
    pub fn release(mut self) {
        self.let_go();
    }

    fn let_go(&mut self) {
        // Parents last: a child that runs sooner finds its parent stopped, which is harmless, while
        // a parent might reap or signal a child that is not let go yet.
        for process in self.processes.drain(..).rev() {
            for thread in process.threads {
                // A thread that was killed meanwhile is gone, which is what its owner wanted.
                let _ = thread.detach();
            }
        }
    }
}

impl Drop for HeldTree {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// A process whose main thread has ended while others run.
pub fn main_thread_ended(pid: i32) -> Report {
    obstacle(
        "engine-main-thread-ended",
        "its main thread has ended while others run",
    )
    .pid(pid)
    .remedy("keep the main thread until the others have ended")
}

/// Threads that are seized so far.
struct Holding {
    threads: BTreeMap<i32, Option<Tracee>>,
    since: Instant,
}

impl Holding {
    /// Seizes and interrupts every thread that is not held yet; gives their ids, and whether a
    /// process was left out because it is between vfork and exec.
    fn seize_all(&mut self, pids: &[i32]) -> Result<(Vec<i32>, bool)> {
        let mut fresh = Vec::new();
        let mut unfinished = false;
        for &pid in pids {
            let status = match Status::read(pid) {
                Ok(status) => status,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(failure("reading status", &error).pid(pid).into()),
            };
            if status.is_dead() {
                continue;
            }
            if status.state == 'Z' {
                return Err(main_thread_ended(pid).into());
            }
            if !self.threads.contains_key(&pid)
                && pids.contains(&status.parent)
                && kcmp(Compare::Memory, pid, status.parent, 0, 0)
                    .is_ok_and(std::cmp::Ordering::is_eq)
            {
                // A child of vfork uses its parent's memory, and its parent cannot stop before it
                // has called exec or ended.
                unfinished = true;
                continue;
            }
            let tids = match proc::threads(pid) {
                Ok(tids) => tids,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(failure("listing threads", &error).pid(pid).into()),
            };
            for tid in tids {
                if self.threads.contains_key(&tid) {
                    continue;
                }
                if let Some(tracee) = seize(pid, tid)? {
                    self.threads.insert(tid, Some(tracee));
                    fresh.push(tid);
                }
            }
        }
        Ok((fresh, unfinished))
    }

    fn wait_all(&mut self, fresh: &[i32]) -> Result<()> {
        let mut waiting: Vec<i32> = fresh.to_vec();
        while let Some(tid) = waiting.pop() {
            let Some(Some(tracee)) = self.threads.get(&tid) else {
                continue;
            };
            let children = match until_stopped(tracee, self.since)? {
                Some(children) => children,
                None => {
                    self.threads.insert(tid, None);
                    continue;
                }
            };
            for child in children {
                self.threads.insert(child, Some(Tracee::attached(child)));
                waiting.push(child);
            }
        }
        Ok(())
    }

    fn into_tree(mut self, pids: &[i32]) -> Result<HeldTree> {
        let mut processes = Vec::new();
        for &pid in pids {
            let mut threads = Vec::new();
            let mut tids = proc::threads(pid).unwrap_or_default();
            tids.sort_by_key(|tid| (*tid != pid, *tid));
            for tid in tids {
                threads.extend(self.threads.remove(&tid).flatten());
            }
            processes.push(HeldProcess { pid, threads });
        }
        Ok(HeldTree {
            processes,
            since: self.since,
        })
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        for tracee in std::mem::take(&mut self.threads).into_values().flatten() {
            // Threads that have not stopped yet run on when this thread ends; others are let go.
            let _ = tracee.detach();
        }
    }
}

fn seize(pid: i32, tid: i32) -> Result<Option<Tracee>> {
    match Tracee::seize(tid, HOLD_OPTIONS) {
        Ok(tracee) => {
            match tracee.interrupt() {
                Ok(()) => {}
                Err(error) if is_gone(&error) => return Ok(None),
                Err(error) => return Err(failure("PTRACE_INTERRUPT", &error).tid(tid).into()),
            }
            Ok(Some(tracee))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc_errno::EPERM) => {
            let status = Status::read_thread(pid, tid).unwrap_or_default();
            if matches!(status.state, 'Z' | 'X') {
                return Ok(None);
            }
            if status.tracer == std::process::id() as i32 {
                return Ok(Some(Tracee::attached(tid)));
            }
            let report = if status.tracer != 0 {
                obstacle(
                    "engine-traced",
                    format!("is traced by process {}", status.tracer),
                )
                .remedy("end the debugger or tracer first")
            } else {
                obstacle("engine-not-permitted", "may not be traced by this engine")
                    .remedy("run crcoord as root with CAP_SYS_PTRACE")
            };
            Err(report.pid(pid).tid(tid).into())
        }
        Err(error) => Err(failure("PTRACE_SEIZE", &error).pid(pid).tid(tid).into()),
    }
}

/// Waits until the thread stands in its interrupt stop; gives the children that the kernel attached
/// on the way, or `None` when the thread has ended.
fn until_stopped(tracee: &Tracee, since: Instant) -> Result<Option<Vec<i32>>> {
    let tid = tracee.tid();
    let mut children = Vec::new();
    loop {
        let stop = match wait_bounded(tracee, since) {
            Ok(Some(stop)) => stop,
            Ok(None) => {
                let state = Status::read(tid).map_or('?', |status| status.state);
                return Err(obstacle(
                    "engine-uninterruptible",
                    format!("a thread did not stop within {STOP_LIMIT:?} (state {state})"),
                )
                .tid(tid)
                .remedy("wait until its input or output has finished")
                .into());
            }
            Err(error) if is_gone(&error) || error.raw_os_error() == Some(10) => return Ok(None),
            Err(error) => return Err(failure("waiting for a thread", &error).tid(tid).into()),
        };
        let interrupted = matches!(
            stop,
            Stop::Event {
                event: event::STOP,
                ..
            }
        );
        if interrupted || stop == Stop::SystemCall {
            let returning = match inject::is_returning(tracee) {
                Ok(returning) => returning,
                Err(error) if is_gone(&error) => return Ok(None),
                Err(error) => return Err(failure("reading registers", &error).tid(tid).into()),
            };
            let step = match (returning, interrupted) {
                // An engine was killed a moment ago: the thread goes on until it is itself again.
                (true, _) => tracee.resume_to_system_call(),
                (false, true) => return Ok(Some(children)),
                (false, false) => tracee.interrupt().and_then(|()| tracee.resume(0)),
            };
            match step {
                Ok(()) => continue,
                Err(error) if is_gone(&error) => return Ok(None),
                Err(error) => return Err(failure("PTRACE_SYSCALL", &error).tid(tid).into()),
            }
        }
        let signal = match stop {
            Stop::Exited(_) | Stop::Killed(_) => return Ok(None),
            Stop::Event {
                event: which @ (event::FORK | event::VFORK | event::CLONE),
                ..
            } => {
                if let Ok(child) = tracee.event_message() {
                    if which == event::VFORK {
                        // Its parent stops only after it has called exec or ended: it runs on, and
                        // the next round finds it.
                        let child = Tracee::attached(child);
                        if until_stopped(&child, since)?.is_some() {
                            let _ = child.detach();
                        }
                    } else {
                        children.push(child);
                    }
                }
                0
            }
            // On its way to the program when the interrupt came: it is delivered.
            Stop::Signal(signal) => signal,
            Stop::SystemCall | Stop::Event { .. } => 0,
        };
        match tracee.resume(signal) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(failure("PTRACE_CONT", &error).tid(tid).into()),
        }
    }
}

/// waitpid(2) has no timeout: looks again and again, yielding at first and then pausing briefly.
fn wait_bounded(tracee: &Tracee, since: Instant) -> io::Result<Option<Stop>> {
    let mut looks = 0u32;
    loop {
        if let Some(stop) = tracee.poll()? {
            return Ok(Some(stop));
        }
        looks += 1;
        if looks < 200 {
            std::thread::yield_now();
        } else {
            if since.elapsed() > STOP_LIMIT {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
