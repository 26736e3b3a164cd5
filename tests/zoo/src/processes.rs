//! Child processes of a program: made by fork, watched through notes, reaped with their reasons.

use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Explain, Failure, Outcome, Stage, ensure, tasks};

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this status.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
}

/// The exit status of a child whose body failed.
pub const FAILED: i32 = 101;

/// A forked child. Killed and reaped on drop unless it was waited for.
#[derive(Debug)]
pub struct Child<'stage> {
    stage: &'stage Stage,
    name: &'static str,
    pid: libc::pid_t,
    owner: u32,
    reaped: bool,
}

/// Given to the child's body: says that its part of the set-up stands.
#[derive(Debug)]
pub struct Gate<'stage>(&'stage Stage);

impl Gate<'_> {
    /// Lets the parent go on. No descriptor is involved.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn open(&self) -> Outcome {
        self.0.note(&format!("gate.{}", std::process::id()))
    }
}

impl<'stage> Child<'stage> {
    /// Forks, runs `body` in the child and waits until it opened its gate. The status is what `body` returns.
    ///
    /// Call it before the program starts threads: only the calling thread exists in the child.
    ///
    /// # Errors
    /// `fork` failed, or the child ended before it opened its gate.
    pub fn spawn(
        stage: &'stage Stage,
        name: &'static str,
        body: impl FnOnce(&Gate<'_>) -> Outcome<u8>,
    ) -> Outcome<Child<'stage>> {
        // SAFETY: the child runs on a copy of this thread; programs fork before they start threads, so no
        // lock of another thread can be held in the copy.
        let pid = unsafe { libc::fork() };
        ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            run_and_exit(stage, name, body);
        }
        let child = Child {
            stage,
            name,
            pid,
            owner: std::process::id(),
            reaped: false,
        };
        let gate = format!("gate.{pid}");
        let mut ended = false;
        tasks::eventually(&format!("set-up of child {name}"), || {
            ended = child.ended_unreaped();
            ended || stage.noted(&gate)
        })?;
        if !stage.noted(&gate) {
            let reason = stage
                .reason_of(pid)
                .unwrap_or_else(|| "no reason left".into());
            return Err(Failure::new(format!(
                "child {name} ended during set-up: {reason}"
            )));
        }
        stage.forget_note(&gate)?;
        Ok(child)
    }

    /// The child's pid.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Whether the child is dead but not reaped, without reaping it.
    pub fn ended_unreaped(&self) -> bool {
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: all-zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: info is valid for writing; WNOWAIT leaves the child as it is.
        let result = unsafe { libc::waitid(libc::P_PID, self.pid as libc::id_t, &mut info, flags) };
        // SAFETY: waitid filled the SIGCHLD member, or left si_pid zero.
        result == 0 && unsafe { info.si_pid() } == self.pid
    }

    /// Waits for the child and returns how it ended.
    ///
    /// # Errors
    /// `waitpid` failed or returned another pid.
    pub fn wait(mut self) -> Outcome<End> {
        let end = wait_for(self.pid).explain(format!("child {}", self.name))?;
        self.reaped = true;
        Ok(end)
    }

    /// Waits and requires one end; otherwise the failure holds the reason that the child left.
    ///
    /// # Errors
    /// It ended in another way.
    pub fn expect(self, expected: End) -> Outcome {
        let (stage, name, pid) = (self.stage, self.name, self.pid);
        let end = self.wait()?;
        if end == expected {
            return Ok(());
        }
        let reason = stage
            .reason_of(pid)
            .unwrap_or_else(|| "no reason left".into());
        Err(Failure::new(format!(
            "child {name}: expected {expected:?}, found {end:?}: {reason}"
        )))
    }

    /// Sends a signal to the child.
    ///
    /// # Errors
    /// As kill(2).
    pub fn kill(&self, signal: i32) -> Outcome {
        // SAFETY: kill has no memory arguments; the pid is an unreaped child of ours.
        let result = unsafe { libc::kill(self.pid, signal) };
        ensure!(
            result == 0,
            "kill {}: {}",
            self.name,
            std::io::Error::last_os_error()
        );
        Ok(())
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        if self.reaped || self.owner != std::process::id() {
            return;
        }
        // SAFETY: the pid is an unreaped child of this process; no memory is passed.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// `waitpid` for one pid, restarted after a handled signal.
///
/// # Errors
/// As waitpid(2).
pub fn wait_for(pid: libc::pid_t) -> Outcome<End> {
    loop {
        let mut status = 0;
        // SAFETY: status is valid for writing.
        let result = unsafe { libc::waitpid(pid, &mut status, 0) };
        if result == pid {
            return if libc::WIFEXITED(status) {
                Ok(End::Exited(libc::WEXITSTATUS(status)))
            } else {
                Ok(End::Killed(libc::WTERMSIG(status)))
            };
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(Failure::new(format!("waitpid {pid}: {error}")));
        }
    }
}

/// Closes a forked child's copy of a descriptor whose owner lives on in the parent's part of the code.
///
/// # Errors
/// As close(2).
pub fn close_inherited(descriptor: &impl AsFd) -> Outcome {
    // SAFETY: children leave by _exit, so the owner's copy is never used or dropped in them.
    let result = unsafe { libc::close(descriptor.as_fd().as_raw_fd()) };
    ensure!(result == 0, "close: {}", std::io::Error::last_os_error());
    Ok(())
}

fn run_and_exit(stage: &Stage, name: &str, body: impl FnOnce(&Gate<'_>) -> Outcome<u8>) -> ! {
    let outcome = catch_unwind(AssertUnwindSafe(|| body(&Gate(stage))))
        .unwrap_or_else(|_| Err(Failure::new("panicked")));
    let status = match outcome {
        Ok(status) => i32::from(status),
        Err(failure) => {
            stage.leave_reason(&Failure::new(format!("in {name}: {failure}")));
            FAILED
        }
    };
    // SAFETY: _exit ends the process at once; nothing of the parent's copy is flushed or dropped.
    unsafe { libc::_exit(status) }
}
