//! Alternate signal stacks: a handler that runs on one across the checkpoint, and others in waiting.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crcoord_zoo::memory::{Mapping, READ_WRITE};
use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::tasks::eventually;
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal, pattern};

const LENGTH: usize = 256 * 1024;
const WAIT: i32 = libc::SIGUSR1;
const HELD_BACK: i32 = libc::SIGUSR2;
const QUICK: i32 = libc::SIGWINCH;

/// What the waiting handlers need; set before the first signal.
static SITUATION: OnceLock<&'static Situation> = OnceLock::new();

struct Situation {
    stage: StagePointer,
    waiting: AtomicUsize,
    broken: AtomicUsize,
    held_back_calls: AtomicUsize,
    quick_calls: AtomicUsize,
    last_quick_address: AtomicUsize,
}

/// The stage outlives every handler: `run` does not return before they do.
struct StagePointer(*const Stage);

// SAFETY: a Stage is immutable and only `go_seen` is called, which is async-signal-safe.
unsafe impl Sync for StagePointer {}
// SAFETY: as above.
unsafe impl Send for StagePointer {}

pub fn run(stage: &Stage) -> Outcome {
    let situation: &'static Situation = Box::leak(Box::new(Situation {
        stage: StagePointer(stage),
        waiting: AtomicUsize::new(0),
        broken: AtomicUsize::new(0),
        held_back_calls: AtomicUsize::new(0),
        quick_calls: AtomicUsize::new(0),
        last_quick_address: AtomicUsize::new(0),
    }));
    ensure!(SITUATION.set(situation).is_ok(), "run twice");
    let mask = Signals::of(&[HELD_BACK]);
    signals::handle(WAIT, wait_on_altstack, libc::SA_ONSTACK, &mask).explain("sigaction")?;
    signals::handle(HELD_BACK, count_held_back, 0, &mask).explain("sigaction")?;
    signals::handle(QUICK, note_address, libc::SA_ONSTACK, &mask).explain("sigaction")?;

    let in_handler = thread::spawn(move || inside(situation));
    let idle = thread::spawn(move || armed(situation, 0));
    let autodisarm = thread::spawn(move || armed(situation, SS_AUTODISARM));
    eventually("the other threads' stacks", || {
        situation.waiting.load(Ordering::SeqCst) == 3
            || in_handler.is_finished()
            || idle.is_finished()
            || autodisarm.is_finished()
    })?;
    // The main thread goes into its handler once ready is written from there.
    let announcer = {
        let path = StagePointer(stage);
        thread::spawn(move || announce(&path, situation))
    };
    let main = inside(situation);
    main.explain("main thread")?;
    for (name, thread) in [
        ("thread in its handler", in_handler),
        ("thread with an idle stack", idle),
        ("thread with SS_AUTODISARM", autodisarm),
        ("announcing thread", announcer),
    ] {
        thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("panicked")))
            .explain(name)?;
    }
    ensure_equal!(
        situation.broken.load(Ordering::SeqCst),
        0,
        "broken handlers"
    );
    ensure_equal!(
        situation.held_back_calls.load(Ordering::SeqCst),
        2,
        "held back signals"
    );
    Ok(())
}

/// Writes ready once all four stacks are in place: two handlers inside, two stacks idle.
fn announce(stage: &StagePointer, situation: &Situation) -> Outcome {
    eventually("handlers on their stacks", || {
        situation.waiting.load(Ordering::SeqCst) == 4
    })?;
    // SAFETY: `run` joins this thread before it gives the stage back.
    unsafe { &*stage.0 }.ready()
}

/// Raises the signal whose handler waits for go, and checks the thread's state afterwards.
fn inside(situation: &Situation) -> Outcome {
    let stack = install(0)?;
    let mask_before = Signals::blocked().numbers();
    let calls = situation.held_back_calls.load(Ordering::SeqCst);
    raise(WAIT)?;
    ensure!(
        situation.held_back_calls.load(Ordering::SeqCst) > calls,
        "the held back signal was lost"
    );
    ensure_equal!(
        Signals::blocked().numbers(),
        mask_before,
        "mask after the handler"
    );
    let now = current()?;
    ensure_equal!(
        now.ss_flags & libc::SS_ONSTACK,
        0,
        "on-stack flag after the handler"
    );
    ensure_equal!(now.ss_sp as usize, stack.address(), "address of the stack");
    ensure_equal!(now.ss_size, LENGTH, "size of the stack");
    Ok(())
}

/// Has a stack that no handler is on during the checkpoint, and uses it afterwards.
fn armed(situation: &Situation, flags: i32) -> Outcome {
    let stack = install(flags)?;
    situation.waiting.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the stage outlives this thread, which `run` joins.
    unsafe { &*situation.stage.0 }.wait_for_go();
    let now = current()?;
    ensure_equal!(
        now.ss_sp as usize,
        stack.address(),
        "address of the idle stack"
    );
    ensure_equal!(now.ss_size, LENGTH, "size of the idle stack");
    let expected = if flags == 0 { 0 } else { SS_AUTODISARM };
    ensure_equal!(
        now.ss_flags & SS_AUTODISARM,
        expected,
        "flags of the idle stack"
    );
    // One thread at a time: the handler leaves its address in a common place.
    while situation.quick_calls.swap(1, Ordering::SeqCst) != 0 {
        thread::yield_now();
    }
    raise(QUICK)?;
    let address = situation.last_quick_address.load(Ordering::SeqCst);
    situation.quick_calls.store(0, Ordering::SeqCst);
    let range = stack.address()..stack.address() + LENGTH;
    ensure!(
        range.contains(&address),
        "the handler ran at {address:#x}, outside its stack"
    );
    Ok(())
}

extern "C" fn wait_on_altstack(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let Some(situation) = SITUATION.get() else {
        return;
    };
    let mut local = [0_u64; 512];
    for (index, word) in local.iter_mut().enumerate() {
        *word = pattern::word(61, index as u64);
    }
    let on_stack = || current().is_ok_and(|stack| stack.ss_flags & libc::SS_ONSTACK != 0);
    let before = on_stack();
    // Blocked by this handler's mask: delivered when it returns, after the restart.
    // SAFETY: raise has no memory arguments.
    unsafe { libc::raise(HELD_BACK) };
    let local = std::hint::black_box(&mut local);
    situation.waiting.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the stage outlives the program's run; both calls are async-signal-safe.
    unsafe { &*situation.stage.0 }.wait_for_go();
    let intact = local
        .iter()
        .enumerate()
        .all(|(i, word)| *word == pattern::word(61, i as u64));
    if !before || !on_stack() || !intact {
        situation.broken.fetch_add(1, Ordering::SeqCst);
    }
}

extern "C" fn count_held_back(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(situation) = SITUATION.get() {
        situation.held_back_calls.fetch_add(1, Ordering::SeqCst);
    }
}

extern "C" fn note_address(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let here = 0_u8;
    if let Some(situation) = SITUATION.get() {
        let address = (&raw const here).addr();
        situation
            .last_quick_address
            .store(address, Ordering::SeqCst);
    }
}

/// From `linux/signal.h`.
const SS_AUTODISARM: i32 = 1 << 31;

fn install(flags: i32) -> Outcome<Mapping> {
    let mapping =
        Mapping::anonymous(LENGTH, READ_WRITE, libc::MAP_PRIVATE).explain("mmap of a stack")?;
    let stack = libc::stack_t {
        ss_sp: mapping.address() as *mut libc::c_void,
        ss_flags: flags,
        ss_size: LENGTH,
    };
    // SAFETY: the stack is mapped for the rest of the program's life.
    let result = unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
    ensure_equal!(result, 0, "sigaltstack");
    Ok(mapping)
}

fn current() -> Outcome<libc::stack_t> {
    let mut stack = libc::stack_t {
        ss_sp: std::ptr::null_mut(),
        ss_flags: 0,
        ss_size: 0,
    };
    // SAFETY: the old stack is written to a valid place.
    let result = unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) };
    ensure_equal!(result, 0, "sigaltstack");
    Ok(stack)
}

/// Sends a signal to the calling thread; delivered before it returns unless blocked.
fn raise(signal: i32) -> Outcome {
    // SAFETY: raise has no memory arguments.
    ensure_equal!(unsafe { libc::raise(signal) }, 0, "raise {signal}");
    Ok(())
}
