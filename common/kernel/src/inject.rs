//! System calls injected into a thread of a running program, such that the program survives the
//! sudden death of the tracer at any moment.
//!
//! The injected code is `syscall` followed by `rt_sigreturn`; the stack pointer always leads to a
//! frame with the thread's own registers, signal mask and extended state. A thread whose tracer
//! vanishes finishes the call and returns to its program by itself. The first call runs from unused
//! bytes of the vdso's ELF header over a frame below the red zone of the thread's stack; it maps an
//! area that all later calls use. Stops are those of PTRACE_SYSCALL: nothing single-steps, no int3.

use std::io;

use crate::arch::{self, Registers};
use crate::memory;
use crate::proc::{Mapping, vm_flags};
use crate::ptrace::{OWNED_OPTIONS, Stop, Tracee, event};
use crate::sys;

/// An injection that did not work. The program is as it was, or has ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process ended meanwhile: an outcome, not a failure.
    #[error("thread {tid} has ended")]
    Gone {
        /// The thread.
        tid: i32,
    },
    /// The process has no vdso to start from.
    #[error("the process has no vdso mapping")]
    NoVdso,
    /// No room for a signal frame below the stack pointer.
    #[error("thread {tid} has less than {needed} bytes of stack left below {stack:#x}")]
    NoStack {
        /// The thread.
        tid: i32,
        /// Stack pointer.
        stack: u64,
        /// Bytes that a frame takes.
        needed: u64,
    },
    /// An injected call failed.
    #[error("injected system call {number} failed: {error}")]
    Call {
        /// Its number.
        number: i64,
        /// Its errno.
        error: io::Error,
    },
    /// ptrace or memory access failed.
    #[error("{what} of thread {tid} failed: {error}")]
    Trace {
        /// The operation.
        what: &'static str,
        /// The thread.
        tid: i32,
        /// The cause.
        error: io::Error,
    },
}

type Result<T> = std::result::Result<T, InjectError>;

const AREA_BYTES: u64 = 64 << 10;
const CLONE_CODE: u64 = 64;
const FRAME_MAIN: u64 = 4 << 10;
const FRAME_THREAD: u64 = 24 << 10;
const SCRATCH: u64 = 44 << 10;
/// Bytes of scratch memory in an injection's area.
pub const SCRATCH_BYTES: u64 = 16 << 10;
const ALL_SIGNALS: u64 = u64::MAX;

/// What a thread was doing when its program was last in charge.
#[derive(Clone, Debug)]
pub struct Original {
    /// Its registers, as at the stop; inside an rseq critical section, at its abort handler.
    pub registers: Registers,
    /// Its signal mask.
    pub mask: u64,
    /// Its extended state.
    pub extended: Vec<u8>,
    /// A signal waits to be delivered as soon as it runs.
    pub signal_pending: bool,
}

impl Original {
    /// Reads it from a stopped thread. `process_pending`: pending signals of the whole process, as
    /// a mask.
    ///
    /// A thread inside an rseq critical section goes on at its abort handler, as after any
    /// preemption (rseq(2)): injected calls make the kernel forget the section.
    pub fn read(thread: &Tracee, pid: i32, process_pending: u64) -> Result<Original> {
        let tid = thread.tid();
        let failed = |what| move |error| trace_error(what, tid, error);
        let mask = thread
            .signal_mask()
            .map_err(failed("reading the signal mask"))?;
        let own = thread
            .pending_signals(false)
            .map_err(failed("reading pending signals"))?;
        let pending = own
            .iter()
            .fold(process_pending, |all, info| all | signal_bit(info));
        let mut registers = thread.registers().map_err(failed("reading registers"))?;
        registers.recall_restarted(|address, bytes| memory::read(pid, address, bytes));
        let rseq = thread.rseq().map_err(failed("reading rseq"))?;
        if rseq.address != 0 {
            leave_critical_section(pid, rseq.address, &mut registers)
                .map_err(failed("reading rseq"))?;
        }
        Ok(Original {
            registers,
            mask,
            extended: thread
                .extended_state()
                .map_err(failed("reading extended state"))?,
            signal_pending: pending & !mask != 0,
        })
    }
}

fn leave_critical_section(pid: i32, rseq: u64, registers: &mut Registers) -> io::Result<()> {
    // struct rseq and struct rseq_cs, linux/rseq.h
    const CRITICAL_SECTION: u64 = 8;
    const START: u64 = 8;
    let section = memory::read_word(pid, rseq + CRITICAL_SECTION)?;
    if section == 0 {
        return Ok(());
    }
    let mut words = [0; 3];
    for (at, word) in (0u64..).zip(&mut words) {
        *word = memory::read_word(pid, section + START + 8 * at)?;
    }
    let [start, length, abort] = words;
    if registers.instruction().wrapping_sub(start) < length {
        registers.set_instruction(abort);
    }
    Ok(())
}

/// Whether a stopped thread is on its way back to its program after its tracer was killed: it stands
/// in injected code. It must be let go on until it has returned before anything is read from it.
pub fn is_returning(thread: &Tracee) -> io::Result<bool> {
    let instruction = thread.registers()?.instruction();
    let page = instruction & !(sys::page_size() - 1);
    let codes: [(u64, &[u8]); 3] = [
        (page, &arch::CALL_AND_RETURN),
        (page + arch::BOOTSTRAP_OFFSET, &arch::CALL_AND_RETURN),
        (page + CLONE_CODE, &arch::CLONE_AND_RETURN),
    ];
    for (start, code) in codes {
        if instruction.wrapping_sub(start) >= code.len() as u64 {
            continue;
        }
        let mut found = vec![0; code.len()];
        // Our code can always be read.
        if memory::read(thread.tid(), start, &mut found).is_ok() && found == code {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The mask bit of the signal that a `siginfo_t` tells of.
pub fn signal_bit(info: &[u8; 128]) -> u64 {
    let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
    if (1..=64).contains(&number) {
        1 << (number - 1)
    } else {
        0
    }
}

fn trace_error(what: &'static str, tid: i32, error: io::Error) -> InjectError {
    if error.raw_os_error() == Some(libc::ESRCH) {
        InjectError::Gone { tid }
    } else {
        InjectError::Trace { what, tid, error }
    }
}

/// A stopped process with an area for injected calls, entered through one of its threads. Dropping
/// it puts everything back.
#[derive(Debug)]
pub struct Injection<'a> {
    thread: &'a Tracee,
    pid: i32,
    original: Original,
    vdso: u64,
    vdso_bytes: [u8; 8],
    stack_frame: u64,
    /// What the program has there, while a frame of ours is in its place.
    stack_bytes: Option<Vec<u8>>,
    area: Option<u64>,
    deferred: Vec<i32>,
    parked: bool,
}

impl<'a> Injection<'a> {
    /// Enters the process through a stopped thread. `mappings` are the process's.
    pub fn begin(
        thread: &'a Tracee,
        pid: i32,
        original: &Original,
        mappings: &[Mapping],
    ) -> Result<Injection<'a>> {
        let tid = thread.tid();
        let vdso = mappings
            .iter()
            .find(|mapping| mapping.name == "[vdso]")
            .ok_or(InjectError::NoVdso)?
            .start;
        let needed = arch::return_frame_bytes(&original.extended);
        let stack = original.registers.stack();
        let frame = (stack.saturating_sub(arch::RED_ZONE + needed)) & !63;
        let fits = mappings.iter().any(|mapping| {
            mapping.start <= frame && stack <= mapping.end && mapping.has(vm_flags::WRITE)
        });
        if !fits {
            return Err(InjectError::NoStack { tid, stack, needed });
        }
        let mut vdso_bytes = [0; 8];
        memory::read(pid, vdso + arch::BOOTSTRAP_OFFSET, &mut vdso_bytes)
            .map_err(|error| trace_error("reading the vdso", tid, error))?;
        let mut code = vdso_bytes;
        code[..arch::CALL_AND_RETURN.len()].copy_from_slice(&arch::CALL_AND_RETURN);
        if code == vdso_bytes {
            // A tracer that was killed left its code behind: what was there are zero bytes.
            vdso_bytes = [0; 8];
        }
        memory::write_forced(pid, vdso + arch::BOOTSTRAP_OFFSET, &code)
            .map_err(|error| trace_error("writing the bootstrap code", tid, error))?;
        let mut injection = Injection {
            thread,
            pid,
            original: original.clone(),
            vdso,
            vdso_bytes,
            stack_frame: frame,
            stack_bytes: None,
            area: None,
            deferred: Vec::new(),
            parked: false,
        };
        injection.map_area()?;
        Ok(injection)
    }

    fn map_area(&mut self) -> Result<()> {
        self.enter_by_vdso()?;
        let gadget = self.vdso + arch::BOOTSTRAP_OFFSET;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let area = self.call_at(
            gadget,
            libc::SYS_mmap,
            [0, AREA_BYTES, protection, flags, u64::MAX, 0],
        )? as u64;
        self.area = Some(area);
        let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        self.call_at(
            gadget,
            libc::SYS_mprotect,
            [area, sys::page_size(), executable, 0, 0, 0],
        )?;
        let tid = self.thread.tid();
        memory::write_forced(self.pid, area, &arch::CALL_AND_RETURN)
            .and_then(|()| {
                memory::write_forced(self.pid, area + CLONE_CODE, &arch::CLONE_AND_RETURN)
            })
            .map_err(|error| trace_error("writing the injected code", tid, error))?;
        self.park(self.thread, &self.original, area, area + FRAME_MAIN)?;
        self.put_back_stack()
    }

    /// Makes a thread safe to lose: registers at our code, then all signals blocked.
    fn park(&self, thread: &Tracee, original: &Original, gadget: u64, frame: u64) -> Result<()> {
        let tid = thread.tid();
        let frame = {
            let bytes = arch::return_frame(
                &original.registers.cured(),
                original.mask,
                &original.extended,
                frame,
            );
            memory::write(self.pid, frame, &bytes.bytes)
                .map_err(|error| trace_error("writing a return frame", tid, error))?;
            bytes
        };
        let mut registers = original.registers;
        registers.set_call(gadget, frame.stack, libc::SYS_getpid, [0; 6]);
        thread
            .set_registers(&registers)
            .and_then(|()| thread.set_signal_mask(ALL_SIGNALS))
            .map_err(|error| trace_error("parking", tid, error))
    }

    fn enter_by_vdso(&mut self) -> Result<()> {
        let tid = self.thread.tid();
        // Kept until it is back: a second entry after a failure must not take our frame for it.
        if self.stack_bytes.is_none() {
            let mut bytes = vec![0; arch::return_frame_bytes(&self.original.extended) as usize];
            memory::read(self.pid, self.stack_frame, &mut bytes)
                .map_err(|error| trace_error("reading the stack", tid, error))?;
            self.stack_bytes = Some(bytes);
        }
        let gadget = self.vdso + arch::BOOTSTRAP_OFFSET;
        self.park(self.thread, &self.original, gadget, self.stack_frame)?;
        self.parked = true;
        Ok(())
    }

    fn put_back_stack(&mut self) -> Result<()> {
        let Some(bytes) = self.stack_bytes.take() else {
            return Ok(());
        };
        memory::write(self.pid, self.stack_frame, &bytes)
            .map_err(|error| trace_error("restoring the stack", self.thread.tid(), error))
    }

    fn area(&self) -> u64 {
        self.area.unwrap_or(0)
    }

    /// Address of scratch memory in the process, [`SCRATCH_BYTES`] long.
    pub fn scratch(&self) -> u64 {
        self.area() + SCRATCH
    }

    /// Start and end of the area: not the program's memory.
    pub fn area_range(&self) -> (u64, u64) {
        (self.area(), self.area() + AREA_BYTES)
    }

    /// Runs a system call in the process.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<i64> {
        self.call_at(self.area(), number, arguments)
    }

    /// Runs a system call whose first bytes of result lie in scratch memory; gives these bytes.
    pub fn call_reading(
        &mut self,
        number: i64,
        arguments: [u64; 6],
        result: &mut [u8],
    ) -> Result<i64> {
        let value = self.call(number, arguments)?;
        memory::read(self.pid, self.scratch(), result)
            .map_err(|error| trace_error("reading a result", self.thread.tid(), error))?;
        Ok(value)
    }

    /// Runs system calls in another stopped thread of the same process; `f` is given a function
    /// that runs one call and a function that reads scratch memory.
    pub fn on_thread<T>(
        &mut self,
        thread: &Tracee,
        original: &Original,
        f: impl FnOnce(&mut ThreadCalls<'_>) -> Result<T>,
    ) -> Result<T> {
        let area = self.area();
        self.park(thread, original, area, area + FRAME_THREAD)?;
        let mut calls = ThreadCalls {
            thread,
            pid: self.pid,
            gadget: area,
            base: original.registers,
            scratch: area + SCRATCH,
            stack: area + FRAME_THREAD + 8,
            deferred: &mut self.deferred,
        };
        let result = f(&mut calls);
        leave(thread, original)?;
        result
    }

    fn call_at(&mut self, gadget: u64, number: i64, arguments: [u64; 6]) -> Result<i64> {
        let frame = match self.area {
            Some(area) if gadget == area => area + FRAME_MAIN,
            _ => self.stack_frame,
        };
        let mut calls = ThreadCalls {
            thread: self.thread,
            pid: self.pid,
            gadget,
            base: self.original.registers,
            scratch: 0,
            stack: frame + 8,
            deferred: &mut self.deferred,
        };
        calls.call(number, arguments)
    }

    /// Makes a copy-on-write copy of the process: a stopped process that never runs program code,
    /// dies with the tracer, holds no descriptors and is a child of the tree's reaper. The program
    /// has no new child.
    pub fn snapshot(&mut self) -> Result<Tracee> {
        let shared = (libc::CLONE_FILES | libc::CLONE_FS) as u64;
        let gadget = self.area() + CLONE_CODE;
        // A helper that shares the address space costs no page tables; its child is the copy.
        let registers = self.original.registers;
        let stack = self.area() + FRAME_MAIN + 8;
        let mut main = ThreadCalls {
            thread: self.thread,
            pid: self.pid,
            gadget,
            base: registers,
            scratch: 0,
            stack,
            deferred: &mut self.deferred,
        };
        let (helper_pid, helper) = main.clone_call(shared | libc::CLONE_VM as u64)?;
        let mut ignored = Vec::new();
        let exiting = gadget + arch::CALL_AND_EXIT_OFFSET;
        let mut from_helper = ThreadCalls {
            thread: &helper,
            pid: self.pid,
            gadget: exiting,
            base: registers,
            scratch: 0,
            stack,
            deferred: &mut ignored,
        };
        let copy = from_helper.clone_call(shared);
        // The helper ends in any case; its parent must collect it before the program could.
        let ended = end_helper(&helper);
        let reaped = self.call(
            libc::SYS_wait4,
            [helper_pid as u64, 0, libc::__WALL as u64, 0, 0, 0],
        );
        let (_, copy) = copy?;
        ended?;
        reaped?;
        let mut ignored = Vec::new();
        let mut from_copy = ThreadCalls {
            thread: &copy,
            pid: copy.tid(),
            gadget: exiting,
            base: registers,
            scratch: 0,
            stack,
            deferred: &mut ignored,
        };
        // CLOSE_RANGE_UNSHARE (close_range(2), Linux 5.9): a table of its own, and empty.
        from_copy.call(libc::SYS_close_range, [0, u64::from(u32::MAX), 2, 0, 0, 0])?;
        Ok(copy)
    }

    /// Puts everything back; the thread is stopped as it was before.
    pub fn end(mut self) -> Result<()> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<()> {
        if !self.parked {
            return self.put_back_vdso();
        }
        self.enter_by_vdso()?;
        if let Some(area) = self.area.take() {
            let gadget = self.vdso + arch::BOOTSTRAP_OFFSET;
            self.call_at(gadget, libc::SYS_munmap, [area, AREA_BYTES, 0, 0, 0, 0])?;
        }
        leave(self.thread, &self.original)?;
        self.parked = false;
        self.put_back_stack()?;
        self.put_back_vdso()?;
        for signal in self.deferred.drain(..) {
            sys::kill(self.pid, signal)
                .map_err(|error| trace_error("handing on a signal", self.pid, error))?;
        }
        Ok(())
    }

    fn put_back_vdso(&self) -> Result<()> {
        memory::write_forced(
            self.pid,
            self.vdso + arch::BOOTSTRAP_OFFSET,
            &self.vdso_bytes,
        )
        .map_err(|error| trace_error("restoring the vdso", self.thread.tid(), error))
    }
}

impl Drop for Injection<'_> {
    fn drop(&mut self) {
        if self.parked {
            // The process may be gone; then there is nothing to put back.
            let _ = self.put_back();
        }
    }
}

fn leave(thread: &Tracee, original: &Original) -> Result<()> {
    thread
        .set_signal_mask(original.mask)
        .and_then(|()| thread.set_registers(&original.registers.continued(original.signal_pending)))
        .map_err(|error| trace_error("unparking", thread.tid(), error))
}

fn end_helper(helper: &Tracee) -> Result<()> {
    let tid = helper.tid();
    loop {
        helper
            .resume(0)
            .map_err(|error| trace_error("ending the helper", tid, error))?;
        match helper.wait() {
            Ok(Stop::Exited(_) | Stop::Killed(_)) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(trace_error("waiting for the helper", tid, error)),
        }
    }
}

/// Calls in one parked thread.
#[derive(Debug)]
pub struct ThreadCalls<'a> {
    thread: &'a Tracee,
    pid: i32,
    gadget: u64,
    base: Registers,
    scratch: u64,
    stack: u64,
    deferred: &'a mut Vec<i32>,
}

impl ThreadCalls<'_> {
    /// Address of scratch memory in the process.
    pub fn scratch(&self) -> u64 {
        self.scratch
    }

    /// Reads the front of the scratch memory.
    pub fn read_scratch(&self, bytes: &mut [u8]) -> Result<()> {
        memory::read(self.pid, self.scratch, bytes)
            .map_err(|error| trace_error("reading a result", self.thread.tid(), error))
    }

    /// Runs one system call; a negative result is an error.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<i64> {
        self.start(number, arguments)?;
        self.finish(number).map(|(value, _)| value)
    }

    /// Runs a clone(2) with these flags and no exit signal; gives the child's id as the process
    /// sees it, and the stopped child, which dies with the tracer from here on.
    fn clone_call(&mut self, flags: u64) -> Result<(i64, Tracee)> {
        self.start(libc::SYS_clone, [flags, 0, 0, 0, 0, 0])?;
        let (inner, child) = self.finish(libc::SYS_clone)?;
        let tid = self.thread.tid();
        let child = child.ok_or_else(|| {
            trace_error("clone", tid, io::Error::other("no event told of the child"))
        })?;
        let child = Tracee::attached(child);
        let failed = |error| trace_error("taking over a clone", child.tid(), error);
        match child.wait().map_err(failed)? {
            Stop::Event {
                event: event::STOP, ..
            } => {}
            _ => return Err(InjectError::Gone { tid: child.tid() }),
        }
        child.set_options(OWNED_OPTIONS).map_err(failed)?;
        Ok((inner, child))
    }

    fn start(&mut self, number: i64, arguments: [u64; 6]) -> Result<()> {
        let tid = self.thread.tid();
        let mut registers = self.base;
        registers.set_call(self.gadget, self.stack, number, arguments);
        self.thread
            .set_registers(&registers)
            .map_err(|error| trace_error("setting up a call", tid, error))
    }

    /// Runs to the end of the call that is set up.
    fn finish(&mut self, number: i64) -> Result<(i64, Option<i32>)> {
        let tid = self.thread.tid();
        let mut edges = 0;
        let mut child = None;
        while edges < 2 {
            self.thread
                .resume_to_system_call()
                .map_err(|error| trace_error("running a call", tid, error))?;
            match self
                .thread
                .wait()
                .map_err(|error| trace_error("waiting for a call", tid, error))?
            {
                Stop::SystemCall => edges += 1,
                Stop::Exited(_) | Stop::Killed(_) => return Err(InjectError::Gone { tid }),
                Stop::Signal(signal) => self.deferred.push(signal),
                Stop::Event {
                    event: event::CLONE | event::FORK | event::VFORK,
                    ..
                } => {
                    child = Some(
                        self.thread
                            .event_message()
                            .map_err(|error| trace_error("asking for a child", tid, error))?,
                    );
                }
                Stop::Event { .. } => {}
            }
        }
        let value = self
            .thread
            .registers()
            .map_err(|error| trace_error("reading a result", tid, error))?
            .result();
        if (-4095..0).contains(&value) {
            let error = io::Error::from_raw_os_error(-value as i32);
            return Err(InjectError::Call { number, error });
        }
        Ok((value, child))
    }
}
