//! x86-64: user registers, extended state, the code that is injected and the signal frame by which
//! an injected thread finds back to its program on its own.

use std::io;

use convert::field;

/// The NT_PRSTATUS registers of a thread (`struct user_regs_struct`).
#[derive(Clone, Copy)]
pub struct Registers(pub libc::user_regs_struct);

/// Kernel-internal results of an interrupted system call (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);

/// How a thread that was stopped inside a system call goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// It was in user mode, or its call is complete.
    No,
    /// The call is issued again with the same arguments.
    Restart,
    /// The kernel keeps what is left of it (`restart_syscall(2)`): `nanosleep`, `poll`, `futex`
    /// with a timeout. That knowledge does not survive the thread.
    RestartBlock,
}

/// Calls that end with EINTR when a tracer interrupts them, although the program got no signal
/// (signal(7), "Interruption of system calls and library functions by stop signals").
///
/// Calls on sockets are among them where the socket has a timeout (socket(7), SO_RCVTIMEO).
const ENDS_WITH_EINTR: [i64; 18] = [
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
];

/// Calls that the kernel restarts by `restart_syscall` (users of `set_restart_fn`, Linux 6.18).
const HAVE_RESTART_BLOCK: [i64; 4] = [
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_poll,
    libc::SYS_futex,
];
/// How far before a `syscall` instruction its number may be loaded, in bytes.
const CODE_LOOKED_AT: usize = 64;
const MOV_EAX: u8 = 0xb8;
const MOV_EDI: u8 = 0xbf;
/// The end of the C library's function syscall(2) before its `syscall` instruction: its arguments
/// move one register further each, and so does the number, out of sight.
const SYSCALL_FUNCTION: [u8; 23] = [
    0x48, 0x89, 0xf8, // mov rax, rdi
    0x48, 0x89, 0xf7, // mov rdi, rsi
    0x48, 0x89, 0xd6, // mov rsi, rdx
    0x48, 0x89, 0xca, // mov rdx, rcx
    0x4d, 0x89, 0xc2, // mov r10, r8
    0x4d, 0x89, 0xc8, // mov r8, r9
    0x4c, 0x8b, 0x4c, 0x24, 0x08, // mov r9, [rsp+8]
];

/// The number of a call with a restart block that the code loads last by `mov REGISTER, NUMBER`.
fn loaded_number(code: &[u8], instruction: u8) -> Option<u8> {
    let loaded = code.windows(5).rev().filter_map(|bytes| match *bytes {
        [first, number, 0, 0, 0] if first == instruction => Some(number),
        _ => None,
    });
    loaded
        .into_iter()
        .find(|number| HAVE_RESTART_BLOCK.contains(&i64::from(*number)))
}

impl Registers {
    /// Instruction pointer.
    pub fn instruction(&self) -> u64 {
        self.0.rip
    }

    /// Sets the instruction pointer.
    pub fn set_instruction(&mut self, address: u64) {
        self.0.rip = address;
    }

    /// Stack pointer.
    pub fn stack(&self) -> u64 {
        self.0.rsp
    }

    /// Result register after a system call.
    pub fn result(&self) -> i64 {
        self.0.rax as i64
    }

    /// The number of the system call the thread is or was in; negative when in none.
    pub fn system_call(&self) -> i64 {
        self.0.orig_rax as i64
    }

    /// What happened to the system call the thread was stopped in. `signal_pending`: a signal will
    /// be delivered as soon as the thread goes on, so an EINTR is the program's own.
    pub fn interrupted(&self, signal_pending: bool) -> Interrupted {
        if self.system_call() < 0 {
            return Interrupted::No;
        }
        match self.result() {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Restart,
            ERESTART_RESTARTBLOCK => Interrupted::RestartBlock,
            EINTR if !signal_pending && ENDS_WITH_EINTR.contains(&self.system_call()) => {
                Interrupted::Restart
            }
            _ => Interrupted::No,
        }
    }

    /// The registers with which the same thread goes on after other calls were injected into it: the
    /// kernel's own restart logic no longer runs for the interrupted call, unless a signal is to be
    /// delivered, which makes it run.
    pub fn continued(&self, signal_pending: bool) -> Registers {
        let mut registers = *self;
        match self.interrupted(signal_pending) {
            _ if signal_pending => return registers,
            Interrupted::No => {}
            Interrupted::Restart => registers.reissue(self.0.orig_rax),
            Interrupted::RestartBlock => registers.reissue(libc::SYS_restart_syscall as u64),
        }
        registers.0.orig_rax = u64::MAX;
        registers
    }

    /// The registers with which a copy of the thread goes on that knows nothing of the kernel's
    /// memory of the call: a call with a timeout starts again with its whole timeout. With a signal
    /// to be delivered the kernel decides, as it would have.
    pub fn restarted(&self, signal_pending: bool) -> Registers {
        if signal_pending { *self } else { self.cured() }
    }

    /// As [`Registers::restarted`] without the kernel's help: for a thread that returns to its
    /// program by `rt_sigreturn`.
    pub fn cured(&self) -> Registers {
        let mut registers = *self;
        if self.interrupted(false) != Interrupted::No {
            registers.reissue(self.0.orig_rax);
        }
        registers.0.orig_rax = u64::MAX;
        registers
    }

    /// Says again which call the thread sleeps in when the kernel has already restarted it once
    /// (restart_syscall(2), after a stop signal or an earlier hold): the number is gone from the
    /// registers, and only the code before the `syscall` instruction tells it. `read` reads code.
    /// Where that tells nothing the registers stay, and the call ends with EINTR in a copy.
    pub fn recall_restarted(&mut self, read: impl Fn(u64, &mut [u8]) -> io::Result<()>) {
        let restart = libc::SYS_restart_syscall;
        let within = self.system_call() == restart && self.result() == ERESTART_RESTARTBLOCK;
        // Let go a moment ago, and not in the call again yet.
        let before = self.system_call() < 0 && self.0.rax as i64 == restart;
        if !within && !before {
            return;
        }
        let end = if before {
            self.0.rip
        } else {
            self.0.rip.wrapping_sub(SYSTEM_CALL_BYTES)
        };
        let mut code = [0; CODE_LOOKED_AT + SYSTEM_CALL_BYTES as usize];
        if read(end.wrapping_sub(CODE_LOOKED_AT as u64), &mut code).is_err() {
            return;
        }
        let (code, instruction) = code.split_at(CODE_LOOKED_AT);
        let number = if code.ends_with(&SYSCALL_FUNCTION) {
            let mut caller = [0; 8];
            let mut before_call = [0; CODE_LOOKED_AT];
            let at =
                |caller: [u8; 8]| u64::from_ne_bytes(caller).wrapping_sub(CODE_LOOKED_AT as u64);
            read(self.0.rsp, &mut caller)
                .and_then(|()| read(at(caller), &mut before_call))
                .ok()
                .and_then(|()| loaded_number(&before_call, MOV_EDI))
        } else {
            loaded_number(code, MOV_EAX)
        };
        if let (Some(number), [0x0f, 0x05]) = (number, instruction) {
            self.0.orig_rax = u64::from(number);
            self.0.rax = ERESTART_RESTARTBLOCK as u64;
            self.0.rip = end + SYSTEM_CALL_BYTES;
        }
    }

    fn reissue(&mut self, number: u64) {
        self.0.rax = number;
        self.0.rip -= SYSTEM_CALL_BYTES;
    }

    /// Prepares a system call at the injected code at `gadget`.
    pub fn set_call(&mut self, gadget: u64, stack: u64, number: i64, arguments: [u64; 6]) {
        let [a, b, c, d, e, f] = arguments;
        let r = &mut self.0;
        (r.rip, r.rsp, r.rax, r.orig_rax) = (gadget, stack, number as u64, u64::MAX);
        (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) = (a, b, c, d, e, f);
        // No trap or direction flag of the program in our code.
        r.eflags = 0x202;
    }

    /// Prepares a run of [`BATCH`] over `count` calls at `calls`.
    pub fn set_batch(&mut self, gadget: u64, calls: u64, count: u64) {
        let r = &mut self.0;
        (r.rip, r.orig_rax, r.r15, r.r14) = (gadget, u64::MAX, calls, count);
        r.eflags = 0x202;
    }

    /// The flags that PTRACE_SETREGS leaves alone, where these registers have any.
    pub fn untraced_flags(&self) -> Option<u64> {
        (self.0.eflags & UNTRACED_FLAGS != 0).then_some(0x202 | UNTRACED_FLAGS)
    }

    /// Prepares a run of [`SET_FLAGS`] with the flags at `stack`.
    pub fn set_flags_run(&mut self, gadget: u64, stack: u64) {
        (self.0.rip, self.0.rsp, self.0.orig_rax) = (gadget, stack, u64::MAX);
    }

    /// The registers as bytes, as `PTRACE_SETREGS` takes them.
    pub fn to_bytes(&self) -> Vec<u8> {
        field::fields(&self.0)
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    /// The registers from bytes; `None` when there are not exactly as many as needed.
    pub fn from_bytes(bytes: &[u8]) -> Option<Registers> {
        let mut values = [0u64; field::COUNT];
        if bytes.len() != values.len() * 8 {
            return None;
        }
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(8)) {
            *value = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        Some(Registers(field::registers(values)))
    }
}

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rip {:#x} rsp {:#x} rax {:#x}",
            self.0.rip, self.0.rsp, self.0.rax
        )
    }
}

/// Field by field conversion of `user_regs_struct`, in the kernel's order.
mod convert {
    pub mod field {
        pub const COUNT: usize = 27;

        macro_rules! convert {
            ($($name:ident)*) => {
                pub fn fields(r: &libc::user_regs_struct) -> [u64; COUNT] {
                    [$(r.$name),*]
                }
                pub fn registers(values: [u64; COUNT]) -> libc::user_regs_struct {
                    let [$($name),*] = values;
                    libc::user_regs_struct { $($name),* }
                }
            };
        }
        convert!(r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags
                 rsp ss fs_base gs_base ds es fs gs);
    }
}

/// Length of the `syscall` instruction.
const SYSTEM_CALL_BYTES: u64 = 2;

/// `syscall; push 15; pop rax; syscall`: one call, then `rt_sigreturn(2)` over the frame the stack
/// pointer leads to. Short enough for the unused bytes of an ELF header, where [`BOOTSTRAP_OFFSET`]
/// puts it for the first injected call.
pub const CALL_AND_RETURN: [u8; 7] = [0x0f, 0x05, 0x6a, 0x0f, 0x58, 0x0f, 0x05];

/// Offset in [`CLONE_AND_RETURN`] of a call after which the process ends at once: for processes that
/// must never reach the program.
pub const CALL_AND_EXIT_OFFSET: u64 = 28;

/// Where in an ELF image the bootstrap code goes: the padding of `e_ident`.
pub const BOOTSTRAP_OFFSET: u64 = 8;

/// As [`CALL_AND_RETURN`], for a `clone`: the parent collects the child before it returns, so that a
/// tracer's death leaves no zombie; the child, which sees result 0, ends at once and never reaches
/// the program.
pub const CLONE_AND_RETURN: [u8; 41] = [
    0x0f, 0x05, // syscall
    0x85, 0xc0, // test eax, eax
    0x74, 0x18, // jz child
    0x78, 0x11, // js return
    0x89, 0xc7, // mov edi, eax
    0x31, 0xf6, // xor esi, esi
    0xba, 0x00, 0x00, 0x00, 0x40, // mov edx, __WALL
    0x45, 0x31, 0xd2, // xor r10d, r10d
    0x6a, 0x3d, // push 61 (wait4)
    0x58, // pop rax
    0x0f, 0x05, // syscall
    // return:
    0x6a, 0x0f, // push 15
    0x58, // pop rax
    0x0f, 0x05, // syscall (rt_sigreturn)
    // child:
    0x31, 0xff, // xor edi, edi
    0xb8, 0xe7, 0x00, 0x00, 0x00, // mov eax, 231 (exit_group)
    0x0f, 0x05, // syscall
    0xeb, 0xf5, // jmp child
];

/// Runs r14 calls described at r15, each as number and six arguments (56 bytes), leaves each result
/// in place of its number, and stops with `int3`. For processes under construction only.
pub const BATCH: [u8; 44] = [
    0x49, 0x8b, 0x07, // mov rax, [r15]
    0x49, 0x8b, 0x7f, 0x08, // mov rdi, [r15+8]
    0x49, 0x8b, 0x77, 0x10, // mov rsi, [r15+16]
    0x49, 0x8b, 0x57, 0x18, // mov rdx, [r15+24]
    0x4d, 0x8b, 0x57, 0x20, // mov r10, [r15+32]
    0x4d, 0x8b, 0x47, 0x28, // mov r8, [r15+40]
    0x4d, 0x8b, 0x4f, 0x30, // mov r9, [r15+48]
    0x0f, 0x05, // syscall
    0x49, 0x89, 0x07, // mov [r15], rax
    0x49, 0x83, 0xc7, 0x38, // add r15, 56
    0x49, 0xff, 0xce, // dec r14
    0x75, 0xd7, // jnz start
    0xcc, // int3
    0xeb, 0xfd, // jmp int3
];

/// `popfq; int3`: sets flags that PTRACE_SETREGS does not (the ID flag of CPUID's presence).
pub const SET_FLAGS: [u8; 2] = [0x9d, 0xcc];

/// Flags that only [`SET_FLAGS`] sets: ID.
const UNTRACED_FLAGS: u64 = 1 << 21;

/// Bytes of one call in a [`BATCH`].
pub const BATCH_CALL_BYTES: usize = 56;

/// Below the stack pointer this many bytes belong to the running function (System V ABI).
pub const RED_ZONE: u64 = 128;

/// A signal frame ready to be written where the stack pointer of an injected call leads to.
#[derive(Clone, Debug)]
pub struct ReturnFrame {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// What the stack pointer must be when `rt_sigreturn` is called.
    pub stack: u64,
}

const FRAME_XSTATE_OFFSET: u64 = 512;
const XSTATE_MAGIC_1: u32 = 0x4650_5853;
const XSTATE_MAGIC_2: u32 = 0x4650_5845;
const SOFTWARE_RESERVED: usize = 464;
const LEGACY_BYTES: usize = 512;

/// Upper bound of a return frame's size for this extended state.
pub fn return_frame_bytes(xstate: &[u8]) -> u64 {
    FRAME_XSTATE_OFFSET + xstate.len() as u64 + 64
}

/// Builds the frame that puts back `registers`, the signal mask and the extended state
/// (`struct rt_sigframe`, arch/x86/include/asm/sigframe.h). `address` must be aligned to 64 bytes.
///
/// The alternate stack in it is invalid on purpose: the kernel then leaves the thread's own as it is
/// (`restore_altstack` forgives all errors but EFAULT).
pub fn return_frame(registers: &Registers, mask: u64, xstate: &[u8], address: u64) -> ReturnFrame {
    let r = &registers.0;
    let xstate_at = address + FRAME_XSTATE_OFFSET;
    let mut bytes = Vec::with_capacity(FRAME_XSTATE_OFFSET as usize + xstate.len() + 4);
    let mut word = |value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    word(0); // pretcode: unused by rt_sigreturn
    word(1 | 2 | 4); // uc_flags: UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    word(0); // uc_link
    word(0); // uc_stack.ss_sp
    word(0x1000); // uc_stack.ss_flags: no valid mode
    word(0); // uc_stack.ss_size
    for value in [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx,
        r.rax, r.rcx, r.rsp, r.rip, r.eflags,
    ] {
        word(value);
    }
    word(r.cs & 0xffff | (r.ss & 0xffff) << 48);
    for _ in 0..4 {
        word(0); // err, trapno, oldmask, cr2
    }
    word(xstate_at);
    for _ in 0..8 {
        word(0); // reserved1
    }
    word(mask);
    bytes.resize(FRAME_XSTATE_OFFSET as usize, 0);
    bytes.extend_from_slice(&signal_xstate(xstate));
    ReturnFrame {
        bytes,
        stack: address + 8,
    }
}

/// Extended state as a signal frame has it: with the software bytes that tell its extent.
fn signal_xstate(xstate: &[u8]) -> Vec<u8> {
    let mut bytes = xstate.to_vec();
    if bytes.len() < LEGACY_BYTES + 64 {
        return bytes;
    }
    let word = |at: usize| {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(value)
    };
    // The regset carries the features the kernel has enabled; the header those in use. Features
    // that are enabled on demand (AMX) count only when in use: a frame larger than the thread's own
    // state is not taken.
    const ON_DEMAND: u64 = 1 << 17 | 1 << 18;
    let in_use = word(LEGACY_BYTES);
    let features = word(SOFTWARE_RESERVED) & !(ON_DEMAND & !in_use);
    let size = standard_size(features).min(bytes.len());
    bytes.truncate(size);
    let software = &mut bytes[SOFTWARE_RESERVED..LEGACY_BYTES];
    software.fill(0);
    software[0..4].copy_from_slice(&XSTATE_MAGIC_1.to_le_bytes());
    software[4..8].copy_from_slice(&(size as u32 + 4).to_le_bytes());
    software[8..16].copy_from_slice(&features.to_le_bytes());
    software[16..20].copy_from_slice(&(size as u32).to_le_bytes());
    bytes.extend_from_slice(&XSTATE_MAGIC_2.to_le_bytes());
    bytes
}

/// Size of the standard (not compacted) XSAVE layout for these features (CPUID leaf 0xD).
fn standard_size(features: u64) -> usize {
    (2..63)
        .filter(|feature| features & (1 << feature) != 0)
        .map(|feature| {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, feature);
            (leaf.eax + leaf.ebx) as usize
        })
        .max()
        .unwrap_or(0)
        .max(LEGACY_BYTES + 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_restarted_is_recalled_from_the_code() {
        let mut code = [0x90; CODE_LOOKED_AT + 2];
        // mov eax, 230; xor edx, edx; syscall
        code[57..].copy_from_slice(&[0xb8, 230, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x05]);
        let read = |at: u64, bytes: &mut [u8]| {
            assert_eq!(at, 0x1000);
            bytes.copy_from_slice(&code);
            io::Result::Ok(())
        };
        // SAFETY: a struct of plain integers; all zero is a valid value.
        let mut within = Registers(unsafe { std::mem::zeroed() });
        within.0.rip = 0x1000 + 66;
        within.0.orig_rax = libc::SYS_restart_syscall as u64;
        within.0.rax = ERESTART_RESTARTBLOCK as u64;
        let mut before = within;
        before.0.rip -= 2;
        before.0.orig_rax = u64::MAX;
        before.0.rax = libc::SYS_restart_syscall as u64;
        for mut registers in [within, before] {
            registers.recall_restarted(read);
            assert_eq!(registers.system_call(), libc::SYS_clock_nanosleep);
            assert_eq!(registers.0.rip, 0x1000 + 66);
            assert_eq!(registers.interrupted(false), Interrupted::RestartBlock);
        }
    }

    #[test]
    fn registers_survive_bytes() {
        let mut registers = Registers(field::registers([0; field::COUNT]));
        registers.0.rip = 7;
        registers.0.gs = 9;
        let bytes = registers.to_bytes();
        assert_eq!(bytes.len(), std::mem::size_of::<libc::user_regs_struct>());
        assert_eq!(Registers::from_bytes(&bytes).unwrap().to_bytes(), bytes);
        assert!(Registers::from_bytes(&bytes[1..]).is_none());
    }

    #[test]
    fn jumps_of_the_injected_code_hit_their_targets() {
        // jz at 4 (length 2) to 11; jmp at 20 (length 2) back to 11.
        assert_eq!(6 + CLONE_AND_RETURN[5] as usize, 30);
        assert_eq!(8 + CLONE_AND_RETURN[7] as usize, 25);
        assert_eq!(41i64 + CLONE_AND_RETURN[40] as i8 as i64, 30);
        let jnz = BATCH.iter().position(|byte| *byte == 0x75).unwrap();
        assert_eq!(jnz as i64 + 2 + BATCH[jnz + 1] as i8 as i64, 0);
        assert_eq!(BATCH[jnz + 2], 0xcc);
    }
}
