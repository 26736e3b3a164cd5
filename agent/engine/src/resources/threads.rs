//! Threads: registers, extended state, masks, alternate stacks, robust futexes, rseq, names.

use crcoord_common::image::ImageRecord;
use crcoord_common::report::Report;
use crcoord_kernel::arch::Registers;
use crcoord_kernel::inject::{Injection, Original, ThreadCalls};
use crcoord_kernel::number::{
    SYS_PRCTL, SYS_RSEQ, SYS_RT_TGSIGQUEUEINFO, SYS_SCHED_SETSCHEDULER, SYS_SET_ROBUST_LIST,
    SYS_SET_TID_ADDRESS, SYS_SIGALTSTACK, flag,
};
use crcoord_kernel::proc::{Stat, Status};
use crcoord_kernel::ptrace::Tracee;
use crcoord_kernel::stub::{Call, Stub};
use crcoord_kernel::sys;
use serde::{Deserialize, Serialize};

use super::credentials::CredentialsImage;
use super::process::restore_nice;
use crate::error::{Result, bad_image, failure};

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// Its id inside the job.
    pub tid: i32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// `user_regs_struct`, ready to go on with.
    #[serde(with = "serde_bytes")]
    pub registers: Vec<u8>,
    /// NT_X86_XSTATE.
    #[serde(with = "serde_bytes")]
    pub extended: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
    /// `stack_t`: address, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// Where the kernel clears the id at the thread's end.
    pub clear_tid: u64,
    /// rseq: address, size, signature.
    pub rseq: (u64, u32, u32),
    /// Pending signals of this thread alone, in order (`siginfo_t`).
    pub pending: Vec<serde_bytes::ByteBuf>,
    /// Nice value.
    pub nice: i32,
    /// Scheduling policy and real-time priority.
    pub policy: (u32, u32),
    /// Identity.
    pub credentials: CredentialsImage,
}

/// All threads of a process, the main thread first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadsImage {
    /// Pid inside the job.
    pub pid: i32,
    /// Its threads.
    pub threads: Vec<ThreadImage>,
}

impl ImageRecord for ThreadsImage {
    const KIND: &'static str = "threads";
}

/// What only the thread itself can ask the kernel.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    alternate_stack: (u64, u32, u64),
    clear_tid: u64,
}

fn ask(
    mut call: impl FnMut(
        i64,
        [u64; 6],
        &mut [u8],
    ) -> std::result::Result<i64, crcoord_kernel::inject::InjectError>,
    scratch: u64,
) -> Result<Asked> {
    let mut stack = [0; 24];
    call(SYS_SIGALTSTACK, [0, scratch, 0, 0, 0, 0], &mut stack)?;
    let mut clear = [0; 8];
    call(
        SYS_PRCTL,
        [flag::PR_GET_TID_ADDRESS, scratch, 0, 0, 0, 0],
        &mut clear,
    )?;
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&stack[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    // SS_ONSTACK tells where the thread is, which its registers tell again; it cannot be set.
    const ON_STACK: u32 = 1;
    Ok(Asked {
        alternate_stack: (word(0), word(8) as u32 & !ON_STACK, word(16)),
        clear_tid: u64::from_ne_bytes(clear),
    })
}

impl ThreadImage {
    /// Reads a stopped thread; the main thread through the injection itself.
    pub fn capture(
        pid: i32,
        thread: &Tracee,
        original: &Original,
        injection: &mut Injection<'_>,
        is_main: bool,
    ) -> Result<ThreadImage> {
        let asked = if is_main {
            let scratch = injection.scratch();
            ask(
                |number, arguments, result| injection.call_reading(number, arguments, result),
                scratch,
            )?
        } else {
            // Errors inside the closure are injection errors; the closure may only fail with those.
            let mut asked = Ok(Asked::default());
            injection.on_thread(thread, original, |calls: &mut ThreadCalls<'_>| {
                let scratch = calls.scratch();
                asked = ask(
                    |number, arguments, result| {
                        let value = calls.call(number, arguments)?;
                        calls.read_scratch(result)?;
                        Ok(value)
                    },
                    scratch,
                );
                Ok(())
            })?;
            asked?
        };
        let tid = thread.tid();
        let failed = |what: &'static str| {
            move |error: std::io::Error| -> Report { failure(what, &error).pid(pid).tid(tid) }
        };
        let status = Status::read_thread(pid, tid).map_err(failed("reading a thread's status"))?;
        let stat = Stat::read_thread(pid, tid).map_err(failed("reading a thread's stat"))?;
        let rseq = thread.rseq().map_err(failed("reading rseq"))?;
        let registers = original.registers.restarted(original.signal_pending);
        let pending = thread
            .pending_signals(false)
            .map_err(failed("reading pending signals"))?;
        Ok(ThreadImage {
            tid: status.inner_pid(),
            name: stat.name,
            registers: registers.to_bytes(),
            extended: original.extended.clone(),
            mask: original.mask,
            alternate_stack: asked.alternate_stack,
            robust_list: sys::robust_list(tid).map_err(failed("get_robust_list"))?,
            clear_tid: asked.clear_tid,
            rseq: (rseq.address, rseq.size, rseq.signature),
            pending: pending
                .iter()
                .map(|info| serde_bytes::ByteBuf::from(info.to_vec()))
                .collect(),
            nice: stat.nice,
            policy: (stat.policy, stat.rt_priority),
            credentials: CredentialsImage::of(&status),
        })
    }

    /// Sets what the kernel keeps of a thread, besides identity, registers and mask.
    pub fn restore(&self, stub: &Stub) -> Result<()> {
        let name = stub.put(0, &terminated(&self.name))?;
        let (stack, flags, size) = self.alternate_stack;
        let mut bytes = stack.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&u64::from(flags).to_ne_bytes());
        bytes.extend_from_slice(&size.to_ne_bytes());
        let stack = stub.put(64, &bytes)?;
        let mut calls = vec![
            Call::new(SYS_PRCTL, [flag::PR_SET_NAME, name, 0, 0, 0]),
            Call::new(SYS_SIGALTSTACK, [stack, 0]),
        ];
        let (head, length) = self.robust_list;
        if head != 0 {
            calls.push(Call::new(SYS_SET_ROBUST_LIST, [head, length]));
        }
        stub.run_all(&calls)?;
        // Gives the thread id.
        stub.run(&[Call::new(SYS_SET_TID_ADDRESS, [self.clear_tid])])?;
        let (address, size, signature) = self.rseq;
        if address != 0 {
            stub.run_all(&[Call::new(
                SYS_RSEQ,
                [address, size.into(), 0, signature.into()],
            )])?;
        }
        Ok(())
    }

    /// Sets priorities, with the rights of the thread's own user: after its identity.
    pub fn restore_priority(&self, stub: &Stub) -> Result<()> {
        restore_nice(stub, self.nice)?;
        let (policy, priority) = self.policy;
        if policy != 0 {
            let parameter = stub.put(0, &priority.to_ne_bytes())?;
            stub.run_all(&[Call::new(
                SYS_SCHED_SETSCHEDULER,
                [0, policy.into(), parameter],
            )])?;
        }
        Ok(())
    }

    /// Queues the thread's pending signals; the thread has them blocked.
    pub fn restore_pending(&self, stub: &Stub, pid: i32) -> Result<()> {
        for info in &self.pending {
            let signal = signal_number(info)?;
            let address = stub.put(0, info)?;
            let (pid, tid) = (pid as u64, self.tid as u64);
            stub.run_all(&[Call::new(
                SYS_RT_TGSIGQUEUEINFO,
                [pid, tid, signal as u64, address],
            )])?;
        }
        Ok(())
    }

    /// The registers to go on with.
    pub fn decoded_registers(&self) -> Result<Registers> {
        Registers::from_bytes(&self.registers).ok_or_else(|| {
            bad_image("a thread's registers have the wrong size")
                .tid(self.tid)
                .into()
        })
    }
}

/// The signal a `siginfo_t` is about.
pub fn signal_number(info: &[u8]) -> Result<i32> {
    let number: Option<[u8; 4]> = info.get(..4).and_then(|bytes| bytes.try_into().ok());
    match number.map(i32::from_ne_bytes) {
        Some(number @ 1..=64) if info.len() == 128 => Ok(number),
        _ => Err(bad_image("a pending signal is malformed").into()),
    }
}

fn terminated(name: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = name.bytes().take(15).collect();
    bytes.resize(16, 0);
    bytes
}
