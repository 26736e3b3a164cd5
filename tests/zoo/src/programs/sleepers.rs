//! Threads blocked in system calls: none may return because of a checkpoint, each is woken at go.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use crcoord_zoo::processes::Child;
use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::tasks::{self, await_blocked, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, descriptors, ensure, ensure_equal};

/// Three years: nobody waits for the end.
const FOREVER: i64 = 100_000_000;
const KNOCK: i32 = libc::SIGUSR1;
const SUSPENDED: i32 = libc::SIGUSR2;

extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

pub fn run(stage: &Stage) -> Outcome {
    signals::handle(KNOCK, nothing, 0, &Signals::of(&[])).explain("sigaction")?;
    signals::handle(SUSPENDED, nothing, 0, &Signals::of(&[])).explain("sigaction")?;
    Signals::of(&[SUSPENDED]).block();
    let parent = std::process::id();
    let child = Child::spawn(stage, "awaited child", |gate| {
        gate.open()?;
        // Ends only after the main process has seen go and allowed waitpid to return.
        while !stage.noted("let-child-end") {
            ensure!(
                std::os::unix::process::parent_id() == parent,
                "the parent is gone"
            );
            tasks::pause_briefly();
        }
        Ok(57)
    })?;
    let sleepers = sleepers(&child)?;
    for sleeper in &sleepers {
        sleeper.await_blocked()?;
    }
    stage.ready()?;
    stage.work_until_go(|| {
        for sleeper in &sleepers {
            ensure!(
                !sleeper.thread.is_finished(),
                "{} returned early",
                sleeper.name
            );
        }
        Ok(())
    })?;
    for sleeper in sleepers {
        let name = sleeper.name;
        sleeper.wake(stage).explain(name)?;
    }
    // Its status was taken by the thread in waitpid.
    let gone = child.wait();
    ensure!(gone.is_err(), "the awaited child could be waited for twice");
    Ok(())
}

/// What ends a sleep.
enum Alarm {
    /// A signal whose handler does nothing: repeated, as the thread may not be in its call yet again.
    Knock,
    /// A signal that is blocked outside of the call: once is enough.
    Suspended,
    /// Bytes into a pipe.
    Bytes(OwnedFd),
    /// A futex wake with an unchanged value.
    Futex(Arc<AtomicU32>),
    /// The awaited child may end.
    ChildEnds,
}

struct Sleeper {
    name: &'static str,
    calls: Vec<libc::c_long>,
    tid: Arc<AtomicI32>,
    allowed: Arc<AtomicBool>,
    alarm: Alarm,
    thread: JoinHandle<Outcome>,
}

impl Sleeper {
    /// Starts a thread that runs `sleep`, which must not return before it is allowed to.
    fn start(
        name: &'static str,
        calls: &[libc::c_long],
        alarm: Alarm,
        sleep: impl FnOnce() -> Outcome + Send + 'static,
    ) -> Sleeper {
        let (tid, allowed) = (
            Arc::new(AtomicI32::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (its_tid, its_allowed) = (Arc::clone(&tid), Arc::clone(&allowed));
        let thread = thread::spawn(move || {
            its_tid.store(gettid(), Ordering::SeqCst);
            let outcome = sleep();
            ensure!(
                its_allowed.load(Ordering::SeqCst),
                "returned early: {outcome:?}"
            );
            outcome
        });
        Sleeper {
            name,
            calls: calls.to_vec(),
            tid,
            allowed,
            alarm,
            thread,
        }
    }

    fn await_blocked(&self) -> Outcome {
        let tid = || self.tid.load(Ordering::SeqCst);
        eventually("start of a sleeper", || tid() != 0)?;
        await_blocked(std::process::id() as i32, tid(), &self.calls).explain(self.name)
    }

    fn wake(self, stage: &Stage) -> Outcome {
        ensure!(!self.thread.is_finished(), "returned early");
        self.allowed.store(true, Ordering::SeqCst);
        let knock = |signal| {
            // SAFETY: the thread is not joined yet, so its handle is valid.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t(), signal) };
        };
        match &self.alarm {
            Alarm::Knock => eventually("end of the sleep", || {
                knock(KNOCK);
                self.thread.is_finished()
            })?,
            Alarm::Suspended => knock(SUSPENDED),
            Alarm::Bytes(end) => descriptors::write_all(end, b"awake!").explain("write")?,
            Alarm::Futex(word) => eventually("a woken futex waiter", || wake_one(word) == 1)?,
            Alarm::ChildEnds => stage.note("let-child-end")?,
        }
        eventually("end of the sleep", || self.thread.is_finished())?;
        self.thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("panicked")))
    }
}

fn sleepers(child: &Child<'_>) -> Outcome<Vec<Sleeper>> {
    let mut all = vec![
        Sleeper::start("nanosleep", &NANOSLEEP, Alarm::Knock, || nanosleep(0)),
        Sleeper::start("clock_nanosleep until", &NANOSLEEP, Alarm::Knock, || {
            nanosleep(libc::TIMER_ABSTIME)
        }),
        Sleeper::start(
            "sigsuspend",
            &[libc::SYS_rt_sigsuspend],
            Alarm::Suspended,
            || {
                // SAFETY: the mask is valid; sigsuspend always returns -1.
                unsafe { libc::sigsuspend(Signals::of(&[KNOCK]).as_raw()) };
                expect_errno(libc::EINTR)?;
                ensure_equal!(
                    Signals::blocked().numbers(),
                    [SUSPENDED],
                    "mask after sigsuspend"
                );
                Ok(())
            },
        ),
    ];
    for (name, seconds) in [("futex", None), ("futex with timeout", Some(FOREVER))] {
        let word = Arc::new(AtomicU32::new(5));
        let alarm = Alarm::Futex(Arc::clone(&word));
        all.push(Sleeper::start(name, &[libc::SYS_futex], alarm, move || {
            let timeout = seconds.map(|tv_sec| libc::timespec { tv_sec, tv_nsec: 0 });
            let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
            let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            // SAFETY: the word and the timeout outlive the call.
            let result =
                unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 5, timeout) };
            let error = std::io::Error::last_os_error();
            ensure!(result == 0, "futex wait returned {result}, {error}");
            Ok(())
        }));
    }
    let (end, writer) = descriptors::pipe(0).explain("pipe")?;
    all.push(Sleeper::start(
        "read",
        &[libc::SYS_read],
        Alarm::Bytes(writer),
        move || {
            let mut buffer = [0_u8; 32];
            // Not the wrapper: an EINTR must be seen.
            // SAFETY: the buffer is valid for its length.
            let count = unsafe { libc::read(end.as_raw_fd(), buffer.as_mut_ptr().cast(), 32) };
            ensure!(
                count == 6 && &buffer[..6] == b"awake!",
                "read returned {count}"
            );
            Ok(())
        },
    ));
    for (name, timeout) in [("poll", -1), ("poll with timeout", i32::MAX)] {
        let (end, writer) = descriptors::pipe(0).explain("pipe")?;
        all.push(Sleeper::start(
            name,
            &[libc::SYS_poll],
            Alarm::Bytes(writer),
            move || {
                let ready = descriptors::poll(&end, libc::POLLIN, timeout).explain("poll")?;
                ensure_equal!(ready, libc::POLLIN, "events of poll");
                Ok(())
            },
        ));
    }
    let (end, writer) = descriptors::pipe(0).explain("pipe")?;
    let selects = [libc::SYS_select, libc::SYS_pselect6];
    all.push(Sleeper::start(
        "select",
        &selects,
        Alarm::Bytes(writer),
        move || select(&end),
    ));
    let (end, writer) = descriptors::pipe(0).explain("pipe")?;
    all.push(Sleeper::start(
        "ppoll",
        &[libc::SYS_ppoll],
        Alarm::Bytes(writer),
        move || ppoll(&end),
    ));
    let pid = child.pid();
    all.push(Sleeper::start(
        "waitpid",
        &[libc::SYS_wait4],
        Alarm::ChildEnds,
        move || {
            let mut status = 0;
            // Not the wrapper: an EINTR must be seen.
            // SAFETY: the status is valid for writing.
            let result = unsafe { libc::waitpid(pid, &mut status, 0) };
            ensure_equal!(
                (result, status),
                (pid, 57 << 8),
                "result and status of waitpid"
            );
            Ok(())
        },
    ));
    Ok(all)
}

const NANOSLEEP: [libc::c_long; 2] = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep];

fn nanosleep(flags: i32) -> Outcome {
    let mut until = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if flags == libc::TIMER_ABSTIME {
        // SAFETY: the clock is written to a valid place.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut until) };
    }
    until.tv_sec += FOREVER;
    let mut rest = libc::timespec {
        tv_sec: -1,
        tv_nsec: -1,
    };
    // SAFETY: both times are valid for the call.
    let error = unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, flags, &until, &mut rest) };
    ensure_equal!(error, libc::EINTR, "result of clock_nanosleep");
    if flags == 0 {
        // Generous: a slept day is not a fault, a lost remainder is.
        let sane = (FOREVER - 86_400..=FOREVER).contains(&rest.tv_sec);
        ensure!(sane, "{} s of {FOREVER} s remain", rest.tv_sec);
    }
    Ok(())
}

fn select(end: &OwnedFd) -> Outcome {
    let number = end.as_fd().as_raw_fd();
    // SAFETY: all-zero is an empty set; the descriptor is far below FD_SETSIZE.
    let (result, is_set) = unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        libc::FD_SET(number, &mut set);
        let none = ptr::null_mut;
        let result = libc::select(number + 1, &mut set, none(), none(), ptr::null_mut());
        (result, libc::FD_ISSET(number, &set))
    };
    ensure!(result == 1 && is_set, "select returned {result}");
    Ok(())
}

fn ppoll(end: &OwnedFd) -> Outcome {
    let mut entry = libc::pollfd {
        fd: end.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mask = Signals::of(&[libc::SIGTERM]);
    // SAFETY: one entry, no timeout, a valid mask.
    let result = unsafe { libc::ppoll(&mut entry, 1, ptr::null(), mask.as_raw()) };
    ensure!(
        result == 1 && entry.revents == libc::POLLIN,
        "ppoll returned {result}"
    );
    ensure_equal!(
        Signals::blocked().numbers(),
        [SUSPENDED],
        "mask after ppoll"
    );
    Ok(())
}

fn wake_one(word: &AtomicU32) -> libc::c_long {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is valid; the kernel only uses its address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 1) }
}

fn expect_errno(expected: i32) -> Outcome {
    let error = std::io::Error::last_os_error();
    ensure_equal!(error.raw_os_error(), Some(expected), "errno");
    Ok(())
}
