//! Restartable sequences: the area that glibc registered stays registered, also inside a sequence.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;

use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal};

/// `struct rseq` of `linux/rseq.h` as far as it is used.
#[repr(C)]
struct Area {
    cpu_id_start: AtomicU32,
    cpu_id: AtomicU32,
    sequence: u64,
    flags: u32,
}

/// The signature glibc registers on x86 (`sys/rseq.h`).
const SIGNATURE: u32 = 0x5305_3053;
const CPUS: usize = 1024;

/// One counter a CPU, each on its own cache line.
#[repr(C, align(64))]
struct Counter(AtomicU64);

static COUNTERS: [Counter; CPUS] = [const { Counter(AtomicU64::new(0)) }; CPUS];

pub fn run(stage: &Stage) -> Outcome {
    let size = registered_size()?;
    check_registration(size)?;
    let go = AtomicBool::new(false);
    let (go, cpus) = (&go, allowed_cpus()?);
    let cpus = &cpus;
    let expected = thread::scope(|scope| {
        let counting: Vec<_> = (0..3)
            .map(|_| scope.spawn(move || count_until(go, size, cpus)))
            .collect();
        let outcome = stage.ready();
        if outcome.is_ok() {
            stage.wait_for_go();
        }
        go.store(true, Ordering::SeqCst);
        let mut sum = 0;
        for thread in counting {
            sum += thread
                .join()
                .unwrap_or_else(|_| Err(Failure::new("panicked")))?;
        }
        outcome.map(|()| sum)
    })?;
    let found: u64 = COUNTERS
        .iter()
        .map(|counter| counter.0.load(Ordering::SeqCst))
        .sum();
    ensure_equal!(
        found,
        expected,
        "sum of the per-CPU counters (a sequence was not aborted)"
    );
    check_registration(size)?;
    check_on_every_cpu(cpus)
}

/// Counts in per-CPU counters by restartable sequences until go; returns how often.
fn count_until(go: &AtomicBool, size: usize, cpus: &[usize]) -> Outcome<u64> {
    check_registration(size)?;
    let area = area()?;
    let mut count = 0;
    while !go.load(Ordering::Relaxed) {
        // SAFETY: the area is this thread's registered one, and no CPU number exceeds the table (checked
        // when the allowed CPUs were read).
        unsafe { zoo_rseq_increment(area, COUNTERS.as_ptr()) };
        count += 1;
    }
    check_registration(size)?;
    check_on_every_cpu(cpus)?;
    Ok(count)
}

/// Moves the thread to each allowed CPU: only a registered area follows.
fn check_on_every_cpu(cpus: &[usize]) -> Outcome {
    let area = area()?;
    for &cpu in cpus {
        // SAFETY: all-zero is an empty set; the CPU number is below its size.
        let result = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
        };
        ensure_equal!(result, 0, "sched_setaffinity to CPU {cpu}");
        // SAFETY: the area of the calling thread lives as long as the thread.
        let in_area = unsafe { (*area).cpu_id.load(Ordering::Relaxed) };
        ensure_equal!(in_area as usize, cpu, "cpu_id in the rseq area");
        // SAFETY: sched_getcpu has no arguments.
        let by_library = unsafe { libc::sched_getcpu() };
        ensure_equal!(by_library as usize, cpu, "sched_getcpu");
        let mut by_call = 0_u32;
        // SAFETY: the kernel writes one word; the other pointers may be null.
        unsafe { libc::syscall(libc::SYS_getcpu, &mut by_call, 0, 0) };
        ensure_equal!(by_call as usize, cpu, "getcpu(2)");
    }
    Ok(())
}

/// Asks the kernel by registering the same area again: EBUSY says that it is there (rseq(2)).
fn check_registration(size: usize) -> Outcome {
    let area = area()?;
    // SAFETY: a registered area is refused; an unregistered one of this size belongs to this thread.
    let result = unsafe { libc::syscall(libc::SYS_rseq, area, size, 0, SIGNATURE) };
    ensure!(
        result == -1,
        "the rseq area of glibc was not registered any more"
    );
    let error = std::io::Error::last_os_error();
    ensure_equal!(
        error.raw_os_error(),
        Some(libc::EBUSY),
        "registering the rseq area again"
    );
    Ok(())
}

/// The calling thread's area: thread pointer plus `__rseq_offset` (glibc 2.35).
fn area() -> Outcome<*const Area> {
    let offset = symbol(c"__rseq_offset")?;
    let thread_pointer: usize;
    // SAFETY: the first word at fs is the thread pointer itself on x86_64 (System V ABI, TLS).
    unsafe {
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread_pointer, options(nostack, readonly));
    }
    // SAFETY: glibc exports a ptrdiff_t under this name.
    let offset = unsafe { *(offset as *const isize) };
    Ok(thread_pointer.wrapping_add_signed(offset) as *const Area)
}

/// The size with which glibc registers: 32 in 2.35 to 2.39 and where the kernel knows no more.
fn registered_size() -> Outcome<usize> {
    let size = symbol(c"__rseq_size")?;
    // SAFETY: glibc exports an unsigned int under this name.
    let size = unsafe { *(size as *const u32) } as usize;
    ensure!(
        size != 0,
        "glibc has registered no rseq area (tunable glibc.pthread.rseq?)"
    );
    Ok(size.max(32))
}

fn symbol(name: &CStr) -> Outcome<*const libc::c_void> {
    // SAFETY: the name is a valid C string.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    ensure!(
        !address.is_null(),
        "this C library has no {name:?}: it registers no rseq area"
    );
    Ok(address)
}

fn allowed_cpus() -> Outcome<Vec<usize>> {
    // SAFETY: all-zero is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for writing with its size.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    ensure_equal!(result, 0, "sched_getaffinity");
    // SAFETY: the numbers are below the set's size.
    let cpus: Vec<usize> = (0..CPUS)
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect();
    cpus.first().explain("no CPU below the table's size")?;
    Ok(cpus)
}

unsafe extern "C" {
    /// Adds one to the counter of the current CPU inside a restartable sequence.
    fn zoo_rseq_increment(area: *const Area, counters: *const Counter);
}

// Almost all the time passes between the load and the store, so a checkpoint falls in there. Who
// resumes such a thread behind its load, without the jump to the abort address, loses counts.
std::arch::global_asm!(
    ".pushsection .data.zoo_rseq, \"aw\", @progbits",
    ".balign 32",
    "zoo_rseq_descriptor:",
    ".long 0, 0",
    ".quad zoo_rseq_start, zoo_rseq_commit - zoo_rseq_start, zoo_rseq_abort",
    ".popsection",
    ".pushsection .text.zoo_rseq, \"ax\", @progbits",
    ".global zoo_rseq_increment",
    "zoo_rseq_increment:",
    "lea rax, [rip + zoo_rseq_descriptor]",
    "mov [rdi + 8], rax",
    "zoo_rseq_start:",
    "mov ecx, [rdi + 4]",
    "shl rcx, 6",
    "add rcx, rsi",
    "mov rdx, [rcx]",
    "inc rdx",
    "mov eax, 200",
    "2: pause",
    "dec eax",
    "jnz 2b",
    "mov [rcx], rdx",
    "zoo_rseq_commit:",
    "mov qword ptr [rdi + 8], 0",
    "ret",
    // The signature before the abort address, as an undefined instruction (sys/rseq.h).
    ".byte 0x0f, 0xb9, 0x3d",
    ".long 0x53053053",
    "zoo_rseq_abort:",
    "jmp zoo_rseq_increment",
    ".popsection",
);
