//! Signals: dispositions, masks, and pending ones that are delivered exactly once, in order, with data.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::thread;

use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::tasks::{self, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal};

/// What a handler saw: signal, code, sender, value.
type Seen = (i32, i32, i32, usize);
/// Signal, handler address, flags, mask.
type Disposition = (i32, usize, i32, Vec<i32>);

const MOST: usize = 32;
static LOG: [Record; MOST] = [const { Record::new() }; MOST];
static LOGGED: AtomicUsize = AtomicUsize::new(0);

struct Record {
    signal: AtomicI32,
    code: AtomicI32,
    sender: AtomicI32,
    value: AtomicUsize,
}

impl Record {
    const fn new() -> Record {
        Record {
            signal: AtomicI32::new(0),
            code: AtomicI32::new(0),
            sender: AtomicI32::new(0),
            value: AtomicUsize::new(0),
        }
    }
}

extern "C" fn log(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let index = LOGGED.fetch_add(1, Ordering::SeqCst);
    let Some(record) = LOG.get(index) else { return };
    // SAFETY: the kernel passes a valid siginfo_t; kill and queue fill sender and value.
    let (code, sender, value) = unsafe {
        (
            (*info).si_code,
            (*info).si_pid(),
            (*info).si_value().sival_ptr as usize,
        )
    };
    record.code.store(code, Ordering::SeqCst);
    record.sender.store(sender, Ordering::SeqCst);
    record.value.store(value, Ordering::SeqCst);
    record.signal.store(signal, Ordering::SeqCst);
}

extern "C" fn never(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    LOGGED.fetch_add(1000, Ordering::SeqCst);
}

pub fn run(stage: &Stage) -> Outcome {
    let first = libc::SIGRTMIN() + 1;
    let (second, third, threads_own) = (first + 1, first + 2, first + 3);
    install(first, second, third)?;
    let dispositions = dispositions()?;
    let mask = Signals::of(&[
        first,
        second,
        third,
        threads_own,
        libc::SIGUSR1,
        libc::SIGURG,
    ]);
    mask.block();
    let (standing, go) = (AtomicI32::new(0), AtomicBool::new(false));
    let pid = std::process::id() as i32;

    thread::scope(|scope| {
        let thread = scope.spawn(|| other_thread(&standing, &go, threads_own));
        let mut outcome = eventually("the second thread", || standing.load(Ordering::SeqCst) != 0);
        if outcome.is_ok() {
            outcome = send(
                pid,
                standing.load(Ordering::SeqCst),
                [first, second, third, threads_own],
            )
            .and_then(|()| stage.ready());
        }
        if outcome.is_ok() {
            stage.wait_for_go();
        }
        let own_mask = Signals::blocked().numbers();
        let pending = Signals::pending().numbers();
        go.store(true, Ordering::SeqCst);
        // The thread checks and takes its own first, so that it cannot take what is the process's.
        thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("panicked")))
            .explain("second thread")?;
        outcome?;
        ensure_equal!(own_mask, mask.numbers(), "signal mask of the main thread");
        let mut expected = vec![
            libc::SIGUSR1,
            libc::SIGURG,
            first,
            second,
            third,
            threads_own,
        ];
        expected.sort_unstable();
        ensure_equal!(pending, expected, "pending signals of the main thread");
        Ok(())
    })?;

    ensure_equal!(
        dispositions,
        self::dispositions()?,
        "dispositions (handler, flags, mask)"
    );
    ensure_equal!(
        LOGGED.load(Ordering::SeqCst),
        0,
        "handlers that ran while all was blocked"
    );
    verify_delivery(pid, [first, second, third, threads_own])?;
    // One-shot: the first delivery resets the disposition.
    // SAFETY: raise has no memory arguments.
    unsafe { libc::raise(libc::SIGWINCH) };
    ensure_equal!(
        LOGGED.swap(0, Ordering::SeqCst),
        1,
        "deliveries of the one-shot signal"
    );
    ensure_equal!(
        signals::action(libc::SIGWINCH).explain("sigaction")?.0,
        libc::SIG_DFL,
        "disposition of the one-shot signal after use"
    );
    Ok(())
}

/// Handlers with different flags and masks.
fn install(first: i32, second: i32, third: i32) -> Outcome {
    let everything = Signals::all();
    let restart = libc::SA_RESTART;
    let all = || -> std::io::Result<()> {
        signals::handle(libc::SIGUSR1, log, restart, &everything)?;
        signals::handle(
            libc::SIGUSR2,
            never,
            libc::SA_NODEFER,
            &Signals::of(&[libc::SIGHUP, 40]),
        )?;
        signals::handle(libc::SIGURG, log, libc::SA_NODEFER, &everything)?;
        signals::handle(libc::SIGWINCH, log, libc::SA_RESETHAND, &Signals::of(&[]))?;
        signals::handle(
            libc::SIGCHLD,
            never,
            libc::SA_NOCLDSTOP,
            &Signals::of(&[libc::SIGALRM]),
        )?;
        signals::handle(
            libc::SIGTERM,
            never,
            libc::SA_ONSTACK | restart,
            &Signals::of(&[]),
        )?;
        for signal in [first, second, third] {
            signals::handle(signal, log, restart, &everything)?;
        }
        signals::handle(64, never, 0, &Signals::of(&[63, 62, 1]))?;
        signals::ignore(libc::SIGHUP)?;
        signals::ignore(libc::SIGTSTP)
    };
    all().explain("sigaction")
}

/// What is pending at the checkpoint: for the process, for the main thread, for the other thread.
fn send(pid: i32, other: i32, signals: [i32; 4]) -> Outcome {
    let [first, second, third, threads_own] = signals;
    let queue = || -> std::io::Result<()> {
        for value in 1..=4 {
            signals::queue_to_process(pid, second, 200 + value)?;
            signals::queue_to_process(pid, first, 100 + value)?;
        }
        signals::queue_to_process(pid, third, 0xFEED_0000_0000)?;
        // A plain signal is kept once, with the data of its first sending.
        signals::queue_to_process(pid, libc::SIGURG, 7)?;
        signals::queue_to_process(pid, libc::SIGURG, 8)?;
        let main = gettid();
        for value in 1..=3 {
            signals::queue_to_thread(other, threads_own, 400 + value)?;
            signals::queue_to_thread(main, threads_own, 500 + value)?;
        }
        signals::queue_to_thread(other, libc::SIGUSR1, 9)?;
        Ok(())
    };
    queue().explain("queueing a signal")?;
    // SAFETY: kill has no memory arguments.
    ensure_equal!(unsafe { libc::kill(pid, libc::SIGUSR1) }, 0, "kill");
    Ok(())
}

/// Has its own mask and its own pending signals.
fn other_thread(standing: &AtomicI32, go: &AtomicBool, threads_own: i32) -> Outcome {
    let mask = Signals::blocked();
    Signals::of(&[libc::SIGQUIT, libc::SIGTERM]).block();
    let expected_mask = Signals::blocked().numbers();
    ensure!(
        expected_mask.len() == mask.numbers().len() + 2,
        "mask before the checkpoint"
    );
    let tid = gettid();
    standing.store(tid, Ordering::SeqCst);
    while !go.load(Ordering::SeqCst) {
        tasks::pause_briefly();
    }
    ensure_equal!(Signals::blocked().numbers(), expected_mask, "signal mask");
    let own = Signals::of(&[threads_own]);
    for value in 401..=403 {
        let info = own
            .take_pending()
            .explain(format!("queued signal with value {value}"))?;
        // SAFETY: a queued signal carries a value.
        let found = unsafe { info.si_value().sival_ptr } as usize;
        ensure_equal!(
            (info.si_code, found),
            (libc::SI_QUEUE, value),
            "the thread's queued signal"
        );
    }
    ensure!(
        own.take_pending().is_err(),
        "a queued signal of the thread was doubled"
    );
    // SIGUSR1 is pending for this thread and for the process: the thread's own comes first.
    let info = Signals::of(&[libc::SIGUSR1])
        .take_pending()
        .explain("the thread's SIGUSR1")?;
    ensure_equal!(info.si_code, libc::SI_QUEUE, "code of the thread's SIGUSR1");
    Ok(())
}

/// Unblocks everything and compares what the handlers saw.
fn verify_delivery(pid: i32, signals: [i32; 4]) -> Outcome {
    let [first, second, third, threads_own] = signals;
    let own = Signals::of(&[threads_own]);
    for value in 501..=503 {
        let info = own
            .take_pending()
            .explain(format!("queued signal with value {value}"))?;
        // SAFETY: a queued signal carries a value.
        let found = unsafe { info.si_value().sival_ptr } as usize;
        ensure_equal!(found, value, "value of the main thread's queued signal");
    }
    ensure!(
        own.take_pending().is_err(),
        "a queued signal of the main thread was doubled"
    );
    Signals::of(&[first, second, third, libc::SIGUSR1, libc::SIGURG]).unblock();

    // Every handler blocks all others, so they run one after the other: lowest number first, queue order.
    let mut expected: Vec<Seen> = vec![
        (libc::SIGUSR1, libc::SI_USER, pid, 0),
        (libc::SIGURG, libc::SI_QUEUE, pid, 7),
    ];
    expected.extend((1..=4).map(|value| (first, libc::SI_QUEUE, pid, 100 + value)));
    expected.extend((1..=4).map(|value| (second, libc::SI_QUEUE, pid, 200 + value)));
    expected.push((third, libc::SI_QUEUE, pid, 0xFEED_0000_0000));
    let count = LOGGED.swap(0, Ordering::SeqCst);
    let found: Vec<Seen> = LOG
        .iter()
        .take(count)
        .map(|record| {
            let signal = record.signal.load(Ordering::SeqCst);
            let code = record.code.load(Ordering::SeqCst);
            // kill(2) fills no value.
            let value = if code == libc::SI_USER {
                0
            } else {
                record.value.load(Ordering::SeqCst)
            };
            (signal, code, record.sender.load(Ordering::SeqCst), value)
        })
        .collect();
    ensure_equal!(
        found,
        expected,
        "delivered signals (number, code, sender, value)"
    );
    Ok(())
}

/// All dispositions, for comparison.
fn dispositions() -> Outcome<Vec<Disposition>> {
    // The C library keeps 32 and 33 for itself and refuses to show them.
    (1..=64)
        .filter(|signal| ![32, 33].contains(signal))
        .map(|signal| {
            let (handler, flags, mask) =
                signals::action(signal).explain(format!("sigaction {signal}"))?;
            Ok((signal, handler, flags, mask))
        })
        .collect()
}
