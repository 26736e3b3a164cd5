//! ptrace(2) of one thread at a time: seize, stop, look, change, let go.
//!
//! Every call must come from the thread that seized (`ESRCH` else), so [`Tracee`] is neither `Send`
//! nor `Sync`. Death of the tracee is an outcome ([`Stop::Exited`], [`Stop::Killed`]), not an error
//! to be guessed at.

use std::io;
use std::marker::PhantomData;

use crate::arch::Registers;
use crate::fault;

/// A thread traced by the calling thread.
#[derive(Debug)]
pub struct Tracee {
    tid: i32,
    _not_send: PhantomData<*const ()>,
}

/// Why a tracee reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Before or after a system call (`PTRACE_O_TRACESYSGOOD`).
    SystemCall,
    /// A ptrace event; for [`event::STOP`] the signal tells a group stop (SIGSTOP and its like) from
    /// an interrupt (SIGTRAP).
    Event {
        /// One of [`event`].
        event: i32,
        /// The signal.
        signal: i32,
    },
    /// A signal is about to be delivered.
    Signal(i32),
    /// The thread has exited with this code.
    Exited(i32),
    /// The thread was ended by this signal.
    Killed(i32),
}

/// Event numbers (linux/ptrace.h).
pub mod event {
    /// fork
    pub const FORK: i32 = libc::PTRACE_EVENT_FORK;
    /// vfork
    pub const VFORK: i32 = libc::PTRACE_EVENT_VFORK;
    /// clone
    pub const CLONE: i32 = libc::PTRACE_EVENT_CLONE;
    /// exec
    pub const EXEC: i32 = libc::PTRACE_EVENT_EXEC;
    /// interrupt, group stop, or first stop of an automatically attached child
    pub const STOP: i32 = libc::PTRACE_EVENT_STOP;
}

/// Options a tree is held with: its children come along, system call stops are told apart.
pub const HOLD_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;
/// Options for processes that must not outlive their tracer.
pub const OWNED_OPTIONS: i32 = HOLD_OPTIONS | libc::PTRACE_O_EXITKILL;

/// A thread's rseq registration (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RseqRegistration {
    /// Address of `struct rseq`; 0 when none is registered.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// The abort signature.
    pub signature: u32,
}

fn call(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass, for each request, either integers or addresses of live buffers of the
    // size that the request is documented to use (ptrace(2)).
    let result = unsafe { libc::ptrace(request as _, tid, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Tracee {
    /// Starts tracing a thread without stopping it.
    pub fn seize(tid: i32, options: i32) -> io::Result<Tracee> {
        call(libc::PTRACE_SEIZE, tid, 0, options as usize)?;
        Ok(Tracee::attached(tid))
    }

    /// A thread that the kernel attached by itself, as the child of a tracee.
    pub fn attached(tid: i32) -> Tracee {
        Tracee {
            tid,
            _not_send: PhantomData,
        }
    }

    /// The thread's id in the caller's PID namespace.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Asks the thread to stop; it reports [`event::STOP`] later.
    pub fn interrupt(&self) -> io::Result<()> {
        call(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Waits for the next report of this thread.
    pub fn wait(&self) -> io::Result<Stop> {
        let stop = wait_for(self.tid, 0)?
            .ok_or_else(|| io::Error::other("a blocking wait returned without a report"))?;
        fault::point();
        Ok(stop)
    }

    /// Looks for a report without waiting.
    pub fn poll(&self) -> io::Result<Option<Stop>> {
        let stop = wait_for(self.tid, libc::WNOHANG)?;
        if stop.is_some() {
            fault::point();
        }
        Ok(stop)
    }

    /// Lets the thread run, delivering `signal` when it is not 0.
    pub fn resume(&self, signal: i32) -> io::Result<()> {
        call(libc::PTRACE_CONT, self.tid, 0, signal as usize).map(drop)
    }

    /// Lets the thread run to the next edge of a system call.
    pub fn resume_to_system_call(&self) -> io::Result<()> {
        call(libc::PTRACE_SYSCALL, self.tid, 0, 0).map(drop)
    }

    /// Ends tracing; the stopped thread runs on.
    pub fn detach(self) -> io::Result<()> {
        call(libc::PTRACE_DETACH, self.tid, 0, 0).map(drop)
    }

    /// Replaces the options.
    pub fn set_options(&self, options: i32) -> io::Result<()> {
        call(libc::PTRACE_SETOPTIONS, self.tid, 0, options as usize).map(drop)
    }

    /// What the last event is about: the new child's id after fork, vfork and clone.
    pub fn event_message(&self) -> io::Result<i32> {
        let mut message: libc::c_ulong = 0;
        call(
            libc::PTRACE_GETEVENTMSG,
            self.tid,
            0,
            &raw mut message as usize,
        )?;
        Ok(message as i32)
    }

    /// General registers.
    pub fn registers(&self) -> io::Result<Registers> {
        // SAFETY: a struct of plain integers; all zero is a valid value.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        call(
            libc::PTRACE_GETREGS,
            self.tid,
            0,
            &raw mut registers as usize,
        )?;
        Ok(Registers(registers))
    }

    /// Sets the general registers.
    pub fn set_registers(&self, registers: &Registers) -> io::Result<()> {
        call(
            libc::PTRACE_SETREGS,
            self.tid,
            0,
            &raw const registers.0 as usize,
        )
        .map(drop)
    }

    /// x87, SSE, AVX and all other extended state (`NT_X86_XSTATE`), in the standard XSAVE layout.
    pub fn extended_state(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0u8; 16 << 10];
        let mut vector = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        call(
            libc::PTRACE_GETREGSET,
            self.tid,
            NT_X86_XSTATE,
            &raw mut vector as usize,
        )?;
        let length = vector.iov_len;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Sets the extended state. EINVAL or EFAULT when the CPU does not know a feature in it.
    pub fn set_extended_state(&self, state: &[u8]) -> io::Result<()> {
        let vector = libc::iovec {
            iov_base: state.as_ptr().cast_mut().cast(),
            iov_len: state.len(),
        };
        call(
            libc::PTRACE_SETREGSET,
            self.tid,
            NT_X86_XSTATE,
            &raw const vector as usize,
        )
        .map(drop)
    }

    /// Blocked signals, bit n-1 for signal n.
    pub fn signal_mask(&self) -> io::Result<u64> {
        let mut mask = 0u64;
        call(PTRACE_GETSIGMASK, self.tid, 8, &raw mut mask as usize)?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    pub fn set_signal_mask(&self, mask: u64) -> io::Result<()> {
        call(PTRACE_SETSIGMASK, self.tid, 8, &raw const mask as usize).map(drop)
    }

    /// Pending signals (`siginfo_t` of 128 bytes each, in queue order) of the thread, or of its
    /// whole process.
    pub fn pending_signals(&self, whole_process: bool) -> io::Result<Vec<[u8; 128]>> {
        const AT_ONCE: usize = 32;
        let mut all = Vec::new();
        loop {
            let arguments = libc::ptrace_peeksiginfo_args {
                off: all.len() as u64,
                flags: u32::from(whole_process),
                nr: AT_ONCE as i32,
            };
            let mut found = [[0u8; 128]; AT_ONCE];
            let count = call(
                libc::PTRACE_PEEKSIGINFO,
                self.tid,
                &raw const arguments as usize,
                found.as_mut_ptr() as usize,
            )? as usize;
            all.extend_from_slice(&found[..count]);
            if count < AT_ONCE {
                return Ok(all);
            }
        }
    }

    /// The rseq registration; EIO before Linux 5.13.
    pub fn rseq(&self) -> io::Result<RseqRegistration> {
        let mut raw = [0u64; 3];
        call(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            24,
            raw.as_mut_ptr() as usize,
        )?;
        Ok(RseqRegistration {
            address: raw[0],
            size: raw[1] as u32,
            signature: (raw[1] >> 32) as u32,
        })
    }
}

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

/// Waits for a report of `tid`; with `WNOHANG` in `flags`, `None` when there is none.
pub fn wait_for(tid: i32, flags: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live int.
        let result = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | flags) };
        if result == 0 {
            return Ok(None);
        }
        if result > 0 {
            return Ok(Some(decode(status)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn decode(status: i32) -> Stop {
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    let event = status >> 16;
    if event != 0 {
        return Stop::Event { event, signal };
    }
    if signal == libc::SIGTRAP | 0x80 {
        return Stop::SystemCall;
    }
    Stop::Signal(signal)
}
