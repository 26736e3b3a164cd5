//! Every register of a thread holds a known value in a loop of pure assembly until go.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, pattern};

/// What the assembly below reads and writes, addressed relative to rip so that no register is needed.
/// The offsets are written out in the assembly.
#[repr(C, align(64))]
struct Block {
    go: AtomicU32,
    level: u32,
    control_word: u16,
    control_word_found: u16,
    mxcsr: u32,
    mxcsr_found: u32,
    padding: [u8; 44],
    general: [u64; 16],
    general_found: [u64; 16],
    vectors: [[u64; 8]; 32],
    vectors_found: [[u64; 8]; 32],
    masks: [u64; 8],
    masks_found: [u64; 8],
    floats: [f64; 8],
    floats_found: [f64; 8],
    flags_found: u64,
    saved: [u64; 8],
}

const _: () = {
    assert!(std::mem::offset_of!(Block, general) == 64);
    assert!(std::mem::offset_of!(Block, general_found) == 192);
    assert!(std::mem::offset_of!(Block, vectors) == 320);
    assert!(std::mem::offset_of!(Block, vectors_found) == 2368);
    assert!(std::mem::offset_of!(Block, masks) == 4416);
    assert!(std::mem::offset_of!(Block, masks_found) == 4480);
    assert!(std::mem::offset_of!(Block, floats) == 4544);
    assert!(std::mem::offset_of!(Block, floats_found) == 4608);
    assert!(std::mem::offset_of!(Block, flags_found) == 4672);
    assert!(std::mem::offset_of!(Block, saved) == 4680);
};

/// The block, shared between the spinning thread (through assembly) and the one that watches for go.
#[repr(transparent)]
struct Shared(UnsafeCell<Block>);

// SAFETY: while the assembly runs, the other thread touches only the atomic `go`.
unsafe impl Sync for Shared {}

#[unsafe(no_mangle)]
static ZOO_REGISTER_BLOCK: Shared = Shared(UnsafeCell::new(Block {
    go: AtomicU32::new(0),
    level: 0,
    control_word: 0,
    control_word_found: 0,
    mxcsr: 0,
    mxcsr_found: 0,
    padding: [0; 44],
    general: [0; 16],
    general_found: [0; 16],
    vectors: [[0; 8]; 32],
    vectors_found: [[0; 8]; 32],
    masks: [0; 8],
    masks_found: [0; 8],
    floats: [0.0; 8],
    floats_found: [0.0; 8],
    flags_found: 0,
    saved: [0; 8],
}));

const SSE: u32 = 0;
const AVX: u32 = 1;
const AVX512: u32 = 2;

/// Single precision, rounding up, all exceptions masked (Intel SDM volume 1, 8.1.5).
const CONTROL_WORD: u16 = 0x087f;
/// Flush to zero, rounding down, all exceptions masked, the inexact flag set (10.2.3).
const MXCSR: u32 = 0xbfa0;
/// The direction flag, the alignment check and the ID flag are set while spinning.
const DIRECTION: u64 = 1 << 10;
const IDENTIFICATION: u64 = 1 << 21;

unsafe extern "C" {
    fn zoo_hold_registers();
}

std::arch::global_asm!(
    ".pushsection .text.zoo_hold_registers, \"ax\", @progbits",
    ".global zoo_hold_registers",
    ".set block, ZOO_REGISTER_BLOCK",
    "zoo_hold_registers:",
    "mov [rip + block + 4680], rbx",
    "mov [rip + block + 4688], rbp",
    "mov [rip + block + 4696], r12",
    "mov [rip + block + 4704], r13",
    "mov [rip + block + 4712], r14",
    "mov [rip + block + 4720], r15",
    "mov [rip + block + 64 + 15 * 8], rsp",
    "stmxcsr [rip + block + 4728]",
    "fnstcw [rip + block + 4736]",
    // x87: eight values, the first one ends at the bottom of the stack.
    "fninit",
    "fldcw [rip + block + 8]",
    ".irp n, 0,1,2,3,4,5,6,7",
    "fld qword ptr [rip + block + 4544 + 8 * \\n]",
    ".endr",
    "ldmxcsr [rip + block + 12]",
    "cmp dword ptr [rip + block + 4], 1",
    "ja 22f",
    "je 21f",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu xmm\\n, [rip + block + 320 + 64 * \\n]",
    ".endr",
    "jmp 3f",
    "21:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu ymm\\n, [rip + block + 320 + 64 * \\n]",
    ".endr",
    "jmp 3f",
    "22:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 zmm\\n, [rip + block + 320 + 64 * \\n]",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq k\\n, [rip + block + 4416 + 8 * \\n]",
    ".endr",
    "3:",
    "pushfq",
    "or qword ptr [rsp], 0x200400",
    "popfq",
    "mov rax, [rip + block + 64]",
    "mov rbx, [rip + block + 72]",
    "mov rcx, [rip + block + 80]",
    "mov rdx, [rip + block + 88]",
    "mov rsi, [rip + block + 96]",
    "mov rdi, [rip + block + 104]",
    "mov rbp, [rip + block + 112]",
    "mov r8,  [rip + block + 120]",
    "mov r9,  [rip + block + 128]",
    "mov r10, [rip + block + 136]",
    "mov r11, [rip + block + 144]",
    "mov r12, [rip + block + 152]",
    "mov r13, [rip + block + 160]",
    "mov r14, [rip + block + 168]",
    "mov r15, [rip + block + 176]",
    "4:",
    "pause",
    "cmp dword ptr [rip + block], 0",
    "je 4b",
    "mov [rip + block + 192], rax",
    "mov [rip + block + 200], rbx",
    "mov [rip + block + 208], rcx",
    "mov [rip + block + 216], rdx",
    "mov [rip + block + 224], rsi",
    "mov [rip + block + 232], rdi",
    "mov [rip + block + 240], rbp",
    "mov [rip + block + 248], r8",
    "mov [rip + block + 256], r9",
    "mov [rip + block + 264], r10",
    "mov [rip + block + 272], r11",
    "mov [rip + block + 280], r12",
    "mov [rip + block + 288], r13",
    "mov [rip + block + 296], r14",
    "mov [rip + block + 304], r15",
    "mov [rip + block + 312], rsp",
    "pushfq",
    "pop [rip + block + 4672]",
    "cld",
    "stmxcsr [rip + block + 16]",
    "fnstcw [rip + block + 10]",
    ".irp n, 7,6,5,4,3,2,1,0",
    "fstp qword ptr [rip + block + 4608 + 8 * \\n]",
    ".endr",
    "cmp dword ptr [rip + block + 4], 1",
    "ja 52f",
    "je 51f",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu [rip + block + 2368 + 64 * \\n], xmm\\n",
    ".endr",
    "jmp 6f",
    "51:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu [rip + block + 2368 + 64 * \\n], ymm\\n",
    ".endr",
    "vzeroupper",
    "jmp 6f",
    "52:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 [rip + block + 2368 + 64 * \\n], zmm\\n",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq [rip + block + 4480 + 8 * \\n], k\\n",
    ".endr",
    "vzeroupper",
    "6:",
    "ldmxcsr [rip + block + 4728]",
    "fldcw [rip + block + 4736]",
    "mov rbx, [rip + block + 4680]",
    "mov rbp, [rip + block + 4688]",
    "mov r12, [rip + block + 4696]",
    "mov r13, [rip + block + 4704]",
    "mov r14, [rip + block + 4712]",
    "mov r15, [rip + block + 4720]",
    "ret",
    ".popsection",
);

pub fn run(stage: &Stage) -> Outcome {
    fill()?;
    let base = 0x1234_5678_9000_u64;
    set_gs_base(base)?;
    let stage_result = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let outcome = stage.ready();
            if outcome.is_ok() {
                stage.wait_for_go();
            }
            // SAFETY: only the atomic is touched while the other thread spins.
            unsafe { (*ZOO_REGISTER_BLOCK.0.get()).go.store(1, Ordering::SeqCst) };
            outcome
        });
        // SAFETY: the function keeps the C calling convention; the level was chosen from the CPU's features.
        unsafe { zoo_hold_registers() };
        watcher.join()
    });
    stage_result
        .ok()
        .explain("the watching thread panicked")??;
    let found = gs_base()?;
    set_gs_base(0)?;
    ensure_equal!(found, base, "base of gs");
    verify()
}

fn fill() -> Outcome {
    // SAFETY: no other thread exists yet.
    let block = unsafe { &mut *ZOO_REGISTER_BLOCK.0.get() };
    let avx512 = std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw");
    block.level = match (avx512, std::arch::is_x86_feature_detected!("avx")) {
        (true, _) => AVX512,
        (false, true) => AVX,
        (false, false) => SSE,
    };
    block.control_word = CONTROL_WORD;
    block.mxcsr = MXCSR;
    for index in 0..15 {
        block.general[index] = pattern::word(51, index as u64);
    }
    for (register, vector) in block.vectors.iter_mut().enumerate() {
        for (lane, word) in vector.iter_mut().enumerate() {
            *word = pattern::word(52 + register as u64, lane as u64);
        }
    }
    for index in 0..8 {
        block.masks[index] = pattern::word(53, index as u64);
        // Exact in single precision, so that the control word does not change them.
        block.floats[index] = f64::from(index as u8) * 1.5 + 0.25;
    }
    Ok(())
}

fn verify() -> Outcome {
    // SAFETY: the other thread has been joined.
    let block = unsafe { &*ZOO_REGISTER_BLOCK.0.get() };
    let names = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15", "rsp",
    ];
    for (index, name) in names.iter().enumerate() {
        ensure_equal!(block.general_found[index], block.general[index], "{name}");
    }
    let (count, lanes) = match block.level {
        AVX512 => (32, 8),
        AVX => (16, 4),
        _ => (16, 2),
    };
    for register in 0..count {
        ensure_equal!(
            block.vectors_found[register][..lanes],
            block.vectors[register][..lanes],
            "vector register {register} ({lanes} words)"
        );
    }
    if block.level == AVX512 {
        ensure_equal!(block.masks_found, block.masks, "mask registers");
    }
    ensure_equal!(block.floats_found, block.floats, "x87 stack");
    ensure_equal!(block.control_word_found, CONTROL_WORD, "x87 control word");
    ensure_equal!(block.mxcsr_found, MXCSR, "MXCSR");
    ensure!(
        block.flags_found & DIRECTION != 0,
        "the direction flag was lost"
    );
    ensure!(
        block.flags_found & IDENTIFICATION != 0,
        "the ID flag was lost"
    );
    Ok(())
}

/// From `asm/prctl.h`: the libc crate has no names for them.
const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

fn set_gs_base(base: u64) -> Outcome {
    // SAFETY: x86_64 user space does not use gs; the base is never dereferenced.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    ensure_equal!(result, 0, "ARCH_SET_GS");
    Ok(())
}

fn gs_base() -> Outcome<u64> {
    let mut base = 0_u64;
    // SAFETY: the kernel writes one word.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &mut base) };
    ensure_equal!(result, 0, "ARCH_GET_GS");
    Ok(base)
}
