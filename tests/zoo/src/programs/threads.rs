//! Eight threads: ids, names, thread-local data, vector registers, locks in use, joining, robust mutex.

use std::cell::{Cell, UnsafeCell};
use std::ffi::CString;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use crcoord_zoo::tasks::{self, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal};

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

/// Threads that hold values in vector registers.
const SPINNERS: u64 = 4;

/// What all threads see.
struct Common {
    go: AtomicBool,
    standing: AtomicUsize,
    rally: Rally,
    key: libc::pthread_key_t,
    parked: (Mutex<bool>, Condvar),
    robust: Robust,
}

pub fn run(stage: &Stage) -> Outcome {
    let mut key = 0;
    // SAFETY: the key is valid for writing and needs no destructor.
    let result = unsafe { libc::pthread_key_create(&mut key, None) };
    ensure_equal!(result, 0, "pthread_key_create");
    let common = Common {
        go: AtomicBool::new(false),
        standing: AtomicUsize::new(0),
        rally: Rally::new(),
        key,
        parked: (Mutex::new(false), Condvar::new()),
        robust: Robust::new()?,
    };
    let common = &common;
    let pid = gettid();
    let exited_unjoined = thread::spawn(|| 99_u64);
    let exited_joined = thread::spawn(|| 98_u64).join();
    ensure!(
        matches!(exited_joined, Ok(98)),
        "joining before the checkpoint"
    );
    eventually("exit of the early thread", || exited_unjoined.is_finished())?;

    thread::scope(|scope| {
        let mut threads: Vec<ScopedJoinHandle<'_, Outcome>> = Vec::new();
        for number in 0..SPINNERS {
            threads.push(scope.spawn(move || member(common, number, || spin(common, number))));
        }
        threads.push(scope.spawn(move || member(common, 4, || common.rally.play(&common.go, 0))));
        threads.push(scope.spawn(move || member(common, 5, || common.rally.play(&common.go, 1))));
        threads.push(scope.spawn(move || member(common, 6, || park(common))));
        threads.push(scope.spawn(move || {
            common.robust.lock().explain("robust mutex")?;
            // Ends at go as its owner, without unlocking.
            member(common, 7, || wait_until(&common.go))
        }));
        let outcome = eventually("eight standing threads", || {
            common.standing.load(Ordering::SeqCst) == 8 || threads.iter().any(|t| t.is_finished())
        })
        .and_then(|()| stage.ready());
        if outcome.is_ok() {
            stage.wait_for_go();
        }
        common.go.store(true, Ordering::SeqCst);
        *common
            .parked
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        common.parked.1.notify_all();
        for (number, thread) in threads.into_iter().enumerate() {
            let result = thread
                .join()
                .unwrap_or_else(|_| Err(Failure::new("panicked")));
            result.explain(format!("thread {number}"))?;
        }
        outcome
    })?;

    common.rally.verify()?;
    ensure_equal!(
        common.robust.lock().err().and_then(|e| e.raw_os_error()),
        Some(libc::EOWNERDEAD),
        "locking a robust mutex whose owner has died"
    );
    ensure_equal!(gettid(), pid, "thread id of the main thread");
    ensure!(
        matches!(exited_unjoined.join(), Ok(99)),
        "joining a thread that exited before"
    );
    let fresh = thread::spawn(gettid)
        .join()
        .map_err(|_| Failure::new("fresh thread panicked"))?;
    ensure!(fresh != pid, "a fresh thread has the main thread's id");
    Ok(())
}

/// What every thread keeps and checks, around what it does.
fn member(common: &Common, number: u64, work: impl FnOnce() -> Outcome) -> Outcome {
    let name = format!("zoo-thread-{number}");
    let c_name = CString::new(name.clone()).explain("name")?;
    tasks::set_name(&c_name);
    let tid = gettid();
    let value = (0xABCD_0000 + number) as usize;
    LOCAL.set(number + 500);
    // SAFETY: the key is valid; the value is never dereferenced.
    unsafe { libc::pthread_setspecific(common.key, value as *const libc::c_void) };
    common.standing.fetch_add(1, Ordering::SeqCst);
    work()?;
    ensure_equal!(gettid(), tid, "thread id");
    ensure_equal!(tasks::name(), name, "thread name");
    ensure_equal!(LOCAL.get(), number + 500, "thread-local variable");
    // SAFETY: the key is valid.
    let found = unsafe { libc::pthread_getspecific(common.key) } as usize;
    ensure_equal!(found, value, "pthread_getspecific");
    Ok(())
}

fn wait_until(go: &AtomicBool) -> Outcome {
    let mut counter = 0_u64;
    while !go.load(Ordering::SeqCst) {
        counter += 1;
        LOCAL.set(LOCAL.get() + 1);
        tasks::pause_briefly();
    }
    let reached = LOCAL.get();
    LOCAL.set(reached - counter);
    Ok(())
}

/// Blocks on a condition variable of the standard library (a futex) until go.
fn park(common: &Common) -> Outcome {
    let mut flag = common
        .parked
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    while !*flag {
        flag = common
            .parked
            .1
            .wait(flag)
            .unwrap_or_else(PoisonError::into_inner);
    }
    ensure!(common.go.load(Ordering::SeqCst), "woken before go");
    Ok(())
}

/// Holds 16 values in xmm registers (ymm where the CPU has AVX) and one on the x87 stack until go.
fn spin(common: &Common, number: u64) -> Outcome {
    let mut given = [0_u64; 64];
    for (index, word) in given.iter_mut().enumerate() {
        *word = crcoord_zoo::pattern::word(number + 40, index as u64);
    }
    let mut taken = [0_u64; 64];
    let mut float = [0.0_f64; 1];
    let go = common.go.as_ptr();
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: 16 registers of 32 bytes are loaded from and stored to arrays of 512 bytes; all
        // registers used are declared; the flag is only read; the x87 stack is left empty.
        unsafe { hold_ymm(&given, &mut taken, &mut float, go) };
        ensure_equal!(taken, given, "ymm registers");
    } else {
        // SAFETY: as above with 16 bytes a register.
        unsafe { hold_xmm(&given, &mut taken, &mut float, go) };
        ensure_equal!(taken[..32], given[..32], "xmm registers");
    }
    ensure_equal!(float[0], std::f64::consts::PI, "x87 register");
    Ok(())
}

macro_rules! define_hold {
    ($name:ident, $instruction:literal, $register:literal, $width:literal, $($feature:literal)?) => {
        /// Loads, spins until `*go` is not zero, and stores.
        ///
        /// # Safety
        /// The CPU has the registers; `go` is valid for reading.
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name(
            given: &[u64; 64],
            taken: &mut [u64; 64],
            float: &mut [f64; 1],
            go: *const bool,
        ) {
            // SAFETY: see the caller; every register that is written is declared.
            unsafe {
                std::arch::asm!(
                    "fldpi",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                    concat!($instruction, " ", $register, "\\n, [{given} + ", $width, " * \\n]"),
                    ".endr",
                    "2:", "pause", "cmp byte ptr [{go}], 0", "je 2b",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                    concat!($instruction, " [{taken} + ", $width, " * \\n], ", $register, "\\n"),
                    ".endr",
                    "fstp qword ptr [{float}]",
                    given = in(reg) given.as_ptr(),
                    taken = in(reg) taken.as_mut_ptr(),
                    float = in(reg) float.as_mut_ptr(),
                    go = in(reg) go,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
        }
    };
}

define_hold!(hold_xmm, "movdqu", "xmm", "16",);
define_hold!(hold_ymm, "vmovdqu", "ymm", "32", "avx");

/// Two threads that hand a ball to each other under a pthread mutex and condition, without a pause.
struct Rally {
    mutex: UnsafeCell<libc::pthread_mutex_t>,
    condition: UnsafeCell<libc::pthread_cond_t>,
    ball: AtomicUsize,
    over: AtomicBool,
    strokes: [AtomicU64; 2],
}

// SAFETY: the mutex and the condition are made for use by several threads; the rest is atomic.
unsafe impl Sync for Rally {}

impl Rally {
    fn new() -> Rally {
        Rally {
            mutex: UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER),
            condition: UnsafeCell::new(libc::PTHREAD_COND_INITIALIZER),
            ball: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            strokes: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// One player. Player 1 ends the rally with its first stroke after go, so both have played equally often.
    fn play(&self, go: &AtomicBool, me: usize) -> Outcome {
        // SAFETY: the mutex is initialised and outlives the threads.
        let locked = unsafe { libc::pthread_mutex_lock(self.mutex.get()) };
        ensure_equal!(locked, 0, "pthread_mutex_lock");
        let mut over = false;
        while !over {
            while self.ball.load(Ordering::Relaxed) % 2 != me {
                // SAFETY: both objects are initialised and the mutex is held by this thread.
                unsafe { libc::pthread_cond_wait(self.condition.get(), self.mutex.get()) };
            }
            over = self.over.load(Ordering::Relaxed);
            if !over {
                over = me == 1 && go.load(Ordering::SeqCst);
                self.strokes[me].fetch_add(1, Ordering::Relaxed);
            }
            self.over.store(over, Ordering::Relaxed);
            self.ball.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the condition is initialised and outlives the threads.
            unsafe { libc::pthread_cond_signal(self.condition.get()) };
        }
        // SAFETY: this thread holds the mutex.
        unsafe { libc::pthread_mutex_unlock(self.mutex.get()) };
        Ok(())
    }

    fn verify(&self) -> Outcome {
        let [first, second] = self.strokes.each_ref().map(|s| s.load(Ordering::SeqCst));
        ensure!(
            first > 0 && first == second,
            "uneven rally: {first} and {second} strokes"
        );
        // One more throw than strokes: player 0 returns the last ball only to say that it has seen the end.
        let ball = self.ball.load(Ordering::SeqCst) as u64;
        ensure_equal!(ball, first + second + 1, "balls thrown");
        Ok(())
    }
}

/// A robust pthread mutex.
struct Robust(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is made for use by several threads.
unsafe impl Sync for Robust {}

impl Robust {
    fn new() -> Outcome<Robust> {
        let mut attributes = MaybeUninit::uninit();
        let mut mutex = MaybeUninit::uninit();
        // SAFETY: both objects are initialised by these calls, in this order.
        let result = unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr())
                | libc::pthread_mutexattr_setrobust(
                    attributes.as_mut_ptr(),
                    libc::PTHREAD_MUTEX_ROBUST,
                )
                | libc::pthread_mutex_init(mutex.as_mut_ptr(), attributes.as_ptr())
        };
        ensure_equal!(result, 0, "making a robust mutex");
        // SAFETY: pthread_mutex_init has initialised it; it is not in use, so it may be moved.
        Ok(Robust(UnsafeCell::new(unsafe { mutex.assume_init() })))
    }

    fn lock(&self) -> std::io::Result<()> {
        // SAFETY: the mutex is initialised and outlives all threads.
        match unsafe { libc::pthread_mutex_lock(self.0.get()) } {
            0 => Ok(()),
            error => Err(std::io::Error::from_raw_os_error(error)),
        }
    }
}
