//! Processes under construction: small copies of the restoring process that wait to be filled, and
//! the code area through which they are driven.

use std::io;

use crate::arch;
use crate::memory;
use crate::ptrace::{OWNED_OPTIONS, Stop, Tracee, event};
use crate::sys;

/// Bytes of the area, mapped at the same address in the builder and all its stubs.
pub const AREA_BYTES: u64 = 256 << 10;
const FLAGS_CODE: u64 = 256;
const CALLS: u64 = 4 << 10;
const CALLS_BYTES: usize = 64 << 10;
const SCRATCH: u64 = 128 << 10;
/// Bytes of scratch memory.
pub const SCRATCH_BYTES: u64 = 128 << 10;

/// One system call of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

impl Call {
    /// A call with up to six arguments.
    pub fn new<const N: usize>(number: i64, arguments: [u64; N]) -> Call {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&arguments);
        Call {
            number,
            arguments: all,
        }
    }
}

/// A stub that did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum StubError {
    /// A call in a stub failed.
    #[error("system call {number} with {arguments:x?} failed while building: {error}")]
    Call {
        /// Its number.
        number: i64,
        /// Its arguments.
        arguments: [u64; 6],
        /// Its errno.
        error: io::Error,
    },
    /// The stub died or stopped unexpectedly.
    #[error("stub {tid} stopped unexpectedly: {stop:?} at {instruction:#x}")]
    Unexpected {
        /// The stub.
        tid: i32,
        /// How.
        stop: Stop,
        /// Its instruction pointer.
        instruction: u64,
    },
    /// ptrace, memory access or a call of the builder itself failed.
    #[error("{what} failed: {error}")]
    Trace {
        /// What.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> StubError {
    move |error| StubError::Trace { what, error }
}

type Result<T> = std::result::Result<T, StubError>;

/// The area mapped in the builder.
#[derive(Debug)]
pub struct Area {
    address: u64,
}

impl Area {
    /// Maps it at `address`, which must be free in this process and in all processes to be built.
    pub fn map(address: u64) -> Result<Area> {
        // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping (Linux 4.17); the area is written
        // only here, before anything can run in it.
        let mapped = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                AREA_BYTES as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if mapped as u64 != address {
            return Err(failed("mapping the builder's area")(
                io::Error::last_os_error(),
            ));
        }
        // SAFETY: the page was just mapped writable; then it becomes executable and read-only.
        let protected = unsafe {
            std::ptr::copy_nonoverlapping(
                arch::BATCH.as_ptr(),
                mapped.cast::<u8>(),
                arch::BATCH.len(),
            );
            std::ptr::copy_nonoverlapping(
                arch::SET_FLAGS.as_ptr(),
                mapped.cast::<u8>().add(FLAGS_CODE as usize),
                arch::SET_FLAGS.len(),
            );
            libc::mprotect(
                mapped,
                sys::page_size() as usize,
                libc::PROT_READ | libc::PROT_EXEC,
            )
        };
        if protected < 0 {
            return Err(failed("protecting the builder's area")(
                io::Error::last_os_error(),
            ));
        }
        Ok(Area { address })
    }

    /// Its first address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Forks the calling process, which must have one thread only, into a stub with this pid in the
    /// PID namespace for its children. It is its caller's child and dies with it.
    ///
    /// EEXIST when the pid is in use, EPERM without CAP_CHECKPOINT_RESTORE in that namespace.
    pub fn fork(&self, pid: i32) -> Result<Stub> {
        #[repr(C)]
        #[derive(Default)]
        struct CloneArguments {
            flags: u64,
            pidfd: u64,
            child_tid: u64,
            parent_tid: u64,
            exit_signal: u64,
            stack: u64,
            stack_size: u64,
            tls: u64,
            set_tid: u64,
            set_tid_size: u64,
            cgroup: u64,
        }
        let set_tid = [pid];
        let arguments = CloneArguments {
            exit_signal: libc::SIGCHLD as u64,
            set_tid: set_tid.as_ptr() as u64,
            set_tid_size: 1,
            ..CloneArguments::default()
        };
        // SAFETY: clone3 without CLONE_VM is a fork; the child touches no memory and only waits.
        let child = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const arguments,
                std::mem::size_of::<CloneArguments>(),
            )
        };
        if child < 0 {
            return Err(failed("forking a stub")(io::Error::last_os_error()));
        }
        if child == 0 {
            // SAFETY: integers only; the loop never ends.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::syscall(libc::SYS_pause);
                }
            }
        }
        let tid = child as i32;
        let seized = Tracee::seize(tid, OWNED_OPTIONS)
            .and_then(|tracee| tracee.interrupt().map(|()| tracee));
        let tracee = match seized {
            Ok(tracee) => tracee,
            Err(error) => {
                // The child was made here and is known by this pid until it is waited for.
                let _ = sys::kill(tid, libc::SIGKILL);
                return Err(failed("tracing a stub")(error));
            }
        };
        Stub {
            tracee,
            area: self.address,
        }
        .stopped()
    }
}

/// A stopped process or thread under construction.
#[derive(Debug)]
pub struct Stub {
    tracee: Tracee,
    area: u64,
}

impl Stub {
    fn stopped(self) -> Result<Stub> {
        match self.tracee.wait().map_err(failed("waiting for a stub"))? {
            Stop::Event {
                event: event::STOP, ..
            } => Ok(self),
            stop => Err(StubError::Unexpected {
                tid: self.tracee.tid(),
                stop,
                instruction: 0,
            }),
        }
    }

    /// The traced thread.
    pub fn tracee(&self) -> &Tracee {
        &self.tracee
    }

    /// Its id in the builder's PID namespace.
    pub fn tid(&self) -> i32 {
        self.tracee.tid()
    }

    /// Address of the scratch memory, [`SCRATCH_BYTES`] long.
    pub fn scratch(&self) -> u64 {
        self.area + SCRATCH
    }

    /// Writes to the scratch memory at an offset; gives the address.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> Result<u64> {
        let address = self.scratch() + offset;
        if offset + bytes.len() as u64 > SCRATCH_BYTES {
            return Err(failed("writing scratch memory")(
                io::ErrorKind::InvalidInput.into(),
            ));
        }
        memory::write(self.tid(), address, bytes).map_err(failed("writing scratch memory"))?;
        Ok(address)
    }

    /// Runs calls one after the other, all of them, and gives their results, errors negative.
    pub fn run(&self, calls: &[Call]) -> Result<Vec<i64>> {
        let mut results = Vec::with_capacity(calls.len());
        for calls in calls.chunks(CALLS_BYTES / arch::BATCH_CALL_BYTES) {
            let mut bytes = Vec::with_capacity(calls.len() * arch::BATCH_CALL_BYTES);
            for call in calls {
                bytes.extend_from_slice(&call.number.to_ne_bytes());
                call.arguments
                    .iter()
                    .for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
            }
            self.start(&bytes, calls.len())?;
            self.until_trap(None)?;
            memory::read(self.tid(), self.area + CALLS, &mut bytes)
                .map_err(failed("reading results"))?;
            for call in bytes.chunks_exact(arch::BATCH_CALL_BYTES) {
                let mut word = [0; 8];
                word.copy_from_slice(&call[..8]);
                results.push(i64::from_ne_bytes(word));
            }
        }
        Ok(results)
    }

    /// Runs calls, none of which may fail.
    pub fn run_all(&self, calls: &[Call]) -> Result<Vec<i64>> {
        let results = self.run(calls)?;
        for (call, result) in calls.iter().zip(&results) {
            if (-4095..0).contains(result) {
                return Err(StubError::Call {
                    number: call.number,
                    arguments: call.arguments,
                    error: io::Error::from_raw_os_error(-*result as i32),
                });
            }
        }
        Ok(results)
    }

    /// Runs one call, which may not fail.
    pub fn call<const N: usize>(&self, number: i64, arguments: [u64; N]) -> Result<i64> {
        Ok(self.run_all(&[Call::new(number, arguments)])?[0])
    }

    /// Makes a child process or thread by clone3(2) with this id in the stub's PID namespace.
    pub fn clone(&self, flags: u64, exit_signal: i32, id: i32) -> Result<Stub> {
        let set_tid = self.put(0, &id.to_ne_bytes())?;
        let mut arguments = [0u64; 11];
        arguments[0] = flags;
        arguments[4] = exit_signal as u64;
        arguments[8] = set_tid;
        arguments[9] = 1;
        let bytes: Vec<u8> = arguments
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let address = self.put(64, &bytes)?;
        let call = Call::new(libc::SYS_clone3, [address, bytes.len() as u64]);
        let mut encoded = call.number.to_ne_bytes().to_vec();
        call.arguments
            .iter()
            .for_each(|word| encoded.extend_from_slice(&word.to_ne_bytes()));
        self.start(&encoded, 1)?;
        let mut child = None;
        self.until_trap(Some(&mut child))?;
        let mut result = [0; 8];
        memory::read(self.tid(), self.area + CALLS, &mut result)
            .map_err(failed("reading results"))?;
        let result = i64::from_ne_bytes(result);
        if result < 0 {
            return Err(StubError::Call {
                number: call.number,
                arguments: [flags, exit_signal as u64, id as u64, 0, 0, 0],
                error: io::Error::from_raw_os_error(-result as i32),
            });
        }
        let child = child
            .ok_or_else(|| failed("cloning")(io::Error::other("no event told of the child")))?;
        Stub {
            tracee: Tracee::attached(child),
            area: self.area,
        }
        .stopped()
    }

    fn start(&self, calls: &[u8], count: usize) -> Result<()> {
        memory::write(self.tid(), self.area + CALLS, calls).map_err(failed("writing calls"))?;
        let mut registers = self
            .tracee
            .registers()
            .map_err(failed("reading a stub's registers"))?;
        registers.set_batch(self.area, self.area + CALLS, count as u64);
        self.tracee
            .set_registers(&registers)
            .map_err(failed("setting up calls"))
    }

    fn until_trap(&self, mut child: Option<&mut Option<i32>>) -> Result<()> {
        loop {
            self.tracee.resume(0).map_err(failed("running calls"))?;
            match self.tracee.wait().map_err(failed("waiting for calls"))? {
                Stop::Signal(libc::SIGTRAP) => return Ok(()),
                Stop::Event {
                    event: event::CLONE | event::FORK | event::VFORK,
                    ..
                } if child.is_some() => {
                    let message = self
                        .tracee
                        .event_message()
                        .map_err(failed("asking for a child"))?;
                    if let Some(child) = child.as_mut() {
                        **child = Some(message);
                    }
                }
                // Signals of other stubs' making (SIGCHLD) mean nothing before the end.
                Stop::Signal(libc::SIGCHLD)
                | Stop::Event {
                    event: event::STOP, ..
                } => {}
                stop => {
                    let instruction = self
                        .tracee
                        .registers()
                        .map(|r| r.instruction())
                        .unwrap_or(0);
                    return Err(StubError::Unexpected {
                        tid: self.tid(),
                        stop,
                        instruction,
                    });
                }
            }
        }
    }

    /// Sets flags that PTRACE_SETREGS leaves alone, where `registers` have any.
    pub fn set_untraced_flags(&self, registers: &arch::Registers) -> Result<()> {
        let Some(flags) = registers.untraced_flags() else {
            return Ok(());
        };
        let stack = self.put(0, &flags.to_ne_bytes())?;
        let mut run = self
            .tracee
            .registers()
            .map_err(failed("reading a stub's registers"))?;
        run.set_flags_run(self.area + FLAGS_CODE, stack);
        self.tracee
            .set_registers(&run)
            .map_err(failed("setting up flags"))?;
        self.until_trap(None)
    }

    /// Runs one call from the `syscall` instruction at `instruction`, which need not be ours: how
    /// the area itself is unmapped.
    pub fn call_from(&self, instruction: u64, call: Call) -> Result<i64> {
        let mut registers = self
            .tracee
            .registers()
            .map_err(failed("reading a stub's registers"))?;
        registers.set_call(instruction, registers.stack(), call.number, call.arguments);
        self.tracee
            .set_registers(&registers)
            .map_err(failed("setting up a call"))?;
        let mut edges = 0;
        while edges < 2 {
            self.tracee
                .resume_to_system_call()
                .map_err(failed("running a call"))?;
            match self.tracee.wait().map_err(failed("waiting for a call"))? {
                Stop::SystemCall => edges += 1,
                Stop::Signal(_)
                | Stop::Event {
                    event: event::STOP, ..
                } => {}
                stop => {
                    return Err(StubError::Unexpected {
                        tid: self.tid(),
                        stop,
                        instruction,
                    });
                }
            }
        }
        let value = self
            .tracee
            .registers()
            .map_err(failed("reading a result"))?
            .result();
        if (-4095..0).contains(&value) {
            return Err(StubError::Call {
                number: call.number,
                arguments: call.arguments,
                error: io::Error::from_raw_os_error(-value as i32),
            });
        }
        Ok(value)
    }

    /// Lets the built thread run.
    pub fn release(self) -> Result<()> {
        self.tracee
            .detach()
            .map_err(failed("releasing a built thread"))
    }

    /// Runs a call that ends the stub, and collects it as its tracer.
    pub fn end_by(&self, call: &Call) -> Result<Stop> {
        self.end_by_delivering(call, 0)
    }

    /// As [`Stub::end_by`] for a call that sends the stub a signal, which is let through.
    pub fn end_by_delivering(&self, call: &Call, wanted: i32) -> Result<Stop> {
        let mut bytes = call.number.to_ne_bytes().to_vec();
        call.arguments
            .iter()
            .for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        self.start(&bytes, 1)?;
        let mut deliver = 0;
        loop {
            self.tracee
                .resume(deliver)
                .map_err(failed("ending a stub"))?;
            deliver = 0;
            match self
                .tracee
                .wait()
                .map_err(failed("waiting for a stub's end"))?
            {
                stop @ (Stop::Exited(_) | Stop::Killed(_)) => return Ok(stop),
                Stop::Signal(signal) if signal == wanted => deliver = signal,
                Stop::Event { .. } | Stop::Signal(libc::SIGCHLD) => {}
                stop => {
                    return Err(StubError::Unexpected {
                        tid: self.tid(),
                        stop,
                        instruction: 0,
                    });
                }
            }
        }
    }
}
