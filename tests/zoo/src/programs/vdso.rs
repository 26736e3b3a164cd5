//! The vdso: threads call it the whole time, so they are frozen inside; its clocks never run backwards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal, memory};

/// Clocks that must never run backwards. After a move to another node this needs a time namespace.
const CLOCKS: [libc::clockid_t; 5] = [
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_MONOTONIC_COARSE,
    libc::CLOCK_MONOTONIC_RAW,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_PROCESS_CPUTIME_ID,
];

pub fn run(stage: &Stage) -> Outcome {
    let place = place()?;
    let go = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| call_until(&go))).collect();
        let outcome = stage.ready();
        if outcome.is_ok() {
            stage.wait_for_go();
        }
        go.store(true, Ordering::SeqCst);
        for thread in threads {
            thread
                .join()
                .unwrap_or_else(|_| Err(Failure::new("panicked")))?;
        }
        outcome
    })?;
    ensure_equal!(self::place()?, place, "place of the vdso");
    Ok(())
}

/// Calls until go, and then some more.
fn call_until(go: &AtomicBool) -> Outcome {
    let mut last = [0_i128; CLOCKS.len()];
    let mut rounds_after = 0;
    while rounds_after < 10_000 {
        if go.load(Ordering::Relaxed) {
            rounds_after += 1;
        }
        // The processor time starts anew in a restarted process; it is called but not compared.
        for (index, &clock) in CLOCKS.iter().enumerate() {
            let now = read(clock)?;
            if clock != libc::CLOCK_PROCESS_CPUTIME_ID {
                ensure!(
                    now >= last[index],
                    "clock {clock} went from {} to {now}",
                    last[index]
                );
            }
            last[index] = now;
        }
        let mut now = libc::timeval {
            tv_sec: 0,
            tv_usec: -1,
        };
        // SAFETY: the time is valid for writing; no time zone is asked for.
        let result = unsafe { libc::gettimeofday(&mut now, std::ptr::null_mut()) };
        let sane = result == 0 && now.tv_sec > 0 && (0..1_000_000).contains(&now.tv_usec);
        ensure!(
            sane,
            "gettimeofday: {result}, {}.{}",
            now.tv_sec,
            now.tv_usec
        );
        // SAFETY: sched_getcpu has no arguments.
        let cpu = unsafe { libc::sched_getcpu() };
        ensure!(cpu >= 0, "sched_getcpu: {cpu}");
        // SAFETY: time may be called without a place for the result.
        ensure!(unsafe { libc::time(std::ptr::null_mut()) } > 0, "time");
    }
    Ok(())
}

/// Nanoseconds of a clock.
fn read(clock: libc::clockid_t) -> Outcome<i128> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: -1,
    };
    // SAFETY: the time is valid for writing.
    let result = unsafe { libc::clock_gettime(clock, &mut now) };
    ensure!(
        result == 0 && (0..1_000_000_000).contains(&now.tv_nsec),
        "clock_gettime {clock}"
    );
    Ok(i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec))
}

/// Where the vdso lies, by the auxiliary vector and by the map: both must agree.
fn place() -> Outcome<usize> {
    let entries = memory::map_entries()?;
    let mapped = entries.iter().find(|entry| entry.name == "[vdso]");
    let mapped = mapped.explain("no [vdso] in /proc/self/maps")?.range.start;
    // SAFETY: getauxval has no memory arguments.
    let announced = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    ensure_equal!(announced, mapped, "AT_SYSINFO_EHDR");
    Ok(mapped)
}
