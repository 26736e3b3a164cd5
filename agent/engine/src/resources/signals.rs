//! Signal handlers and pending signals of a process.

use crcoord_common::image::ImageRecord;
use crcoord_kernel::inject::Injection;
use crcoord_kernel::number::{SYS_RT_SIGACTION, SYS_RT_SIGQUEUEINFO};
use crcoord_kernel::proc::Status;
use crcoord_kernel::ptrace::Tracee;
use crcoord_kernel::stub::{Call, Stub};
use serde::{Deserialize, Serialize};

use super::threads::signal_number;
use crate::error::{Result, bad_image, failure};

/// Actions that differ from the default, and the process's queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalsImage {
    /// Pid inside the job.
    pub pid: i32,
    /// Signal number and its action.
    pub actions: Vec<(i32, Action)>,
    /// Pending signals of the process, in order (`siginfo_t`).
    pub pending: Vec<serde_bytes::ByteBuf>,
}

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// 0 default, 1 ignore, else an address.
    pub handler: u64,
    /// SA_*.
    pub flags: u64,
    /// Return trampoline.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

impl ImageRecord for SignalsImage {
    const KIND: &'static str = "signals";
}

impl Action {
    fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (to, word) in
            bytes
                .chunks_exact_mut(8)
                .zip([self.handler, self.flags, self.restorer, self.mask])
        {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; 32]) -> Action {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
            u64::from_ne_bytes(word)
        };
        Action {
            handler: word(0),
            flags: word(1),
            restorer: word(2),
            mask: word(3),
        }
    }
}

const SIGCHLD: i32 = 17;
const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;

impl SignalsImage {
    /// Reads a held process.
    pub fn capture(
        pid: i32,
        inner: i32,
        thread: &Tracee,
        status: &Status,
        injection: &mut Injection<'_>,
    ) -> Result<SignalsImage> {
        let special = status.caught | status.ignored;
        let scratch = injection.scratch();
        let mut actions = Vec::new();
        for signal in (1..=64).filter(|signal| !matches!(*signal, SIGKILL | SIGSTOP)) {
            // SIGCHLD's flags matter also for the default action (SA_NOCLDWAIT).
            if special & (1 << (signal - 1)) == 0 && signal != SIGCHLD {
                continue;
            }
            let mut bytes = [0; 32];
            injection.call_reading(
                SYS_RT_SIGACTION,
                [signal as u64, 0, scratch, 8, 0, 0],
                &mut bytes,
            )?;
            let action = Action::from_bytes(&bytes);
            if action != Action::default() {
                actions.push((signal, action));
            }
        }
        let pending = thread
            .pending_signals(true)
            .map_err(|error| failure("reading pending signals", &error).pid(pid))?;
        Ok(SignalsImage {
            pid: inner,
            actions,
            pending: pending
                .iter()
                .map(|info| serde_bytes::ByteBuf::from(info.to_vec()))
                .collect(),
        })
    }

    /// Drops what the stub got while it was built, and sets all actions. SIGTRAP's comes by
    /// [`SignalsImage::restore_trap`], because the builder's own stops use it.
    pub fn restore(&self, stub: &Stub) -> Result<()> {
        const SIGTRAP: i32 = 5;
        let ignore = stub.put(
            0,
            &Action {
                handler: 1,
                ..Action::default()
            }
            .to_bytes(),
        )?;
        let default = stub.put(32, &Action::default().to_bytes())?;
        let mut calls = Vec::new();
        let changeable =
            (1..=64u64).filter(|signal| !matches!(*signal as i32, SIGKILL | SIGSTOP | SIGTRAP));
        for signal in changeable {
            // Ignoring drops what is queued (POSIX); then the default is back.
            calls.push(Call::new(SYS_RT_SIGACTION, [signal, ignore, 0, 8]));
            calls.push(Call::new(SYS_RT_SIGACTION, [signal, default, 0, 8]));
        }
        stub.run_all(&calls)?;
        let mut calls = Vec::new();
        for (offset, (signal, action)) in (64u64..).step_by(32).zip(&self.actions) {
            if !(1..=64).contains(signal) || matches!(*signal, SIGKILL | SIGSTOP) {
                return Err(bad_image(format!("an action for signal {signal}"))
                    .pid(self.pid)
                    .into());
            }
            let address = stub.put(offset, &action.to_bytes())?;
            if *signal != SIGTRAP {
                calls.push(Call::new(SYS_RT_SIGACTION, [*signal as u64, address, 0, 8]));
            }
        }
        stub.run_all(&calls)?;
        Ok(())
    }

    /// The last call of all that uses the builder's area: sets SIGTRAP's action from the `syscall`
    /// instruction at `instruction`.
    pub fn restore_trap(&self, stub: &Stub, instruction: u64) -> Result<()> {
        const SIGTRAP: i32 = 5;
        let Some((_, action)) = self.actions.iter().find(|(signal, _)| *signal == SIGTRAP) else {
            return Ok(());
        };
        let address = stub.put(0, &action.to_bytes())?;
        stub.call_from(
            instruction,
            Call::new(SYS_RT_SIGACTION, [SIGTRAP as u64, address, 0, 8]),
        )?;
        Ok(())
    }

    /// Queues the process's pending signals; all threads have them blocked.
    pub fn restore_pending(&self, stub: &Stub) -> Result<()> {
        for info in &self.pending {
            let signal = signal_number(info)?;
            let address = stub.put(0, info)?;
            stub.run_all(&[Call::new(
                SYS_RT_SIGQUEUEINFO,
                [self.pid as u64, signal as u64, address],
            )])?;
        }
        Ok(())
    }
}
