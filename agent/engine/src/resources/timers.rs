//! Interval timers, setitimer(2): what is left of the time at the cut is left at restart.

use crcoord_common::image::ImageRecord;
use crcoord_kernel::inject::Injection;
use crcoord_kernel::number::{SYS_GETITIMER, SYS_SETITIMER};
use crcoord_kernel::stub::{Call, Stub};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The three timers of a process: ITIMER_REAL, _VIRTUAL, _PROF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimersImage {
    /// Pid inside the job.
    pub pid: i32,
    /// `struct itimerval` of each: interval seconds and microseconds, then the time left.
    pub timers: [[u64; 4]; 3],
}

impl ImageRecord for IntervalTimersImage {
    const KIND: &'static str = "interval-timers";
}

impl IntervalTimersImage {
    /// Reads a held process; `None` when no timer runs.
    pub fn capture(inner: i32, injection: &mut Injection<'_>) -> Result<Option<Self>> {
        let scratch = injection.scratch();
        let mut timers = [[0; 4]; 3];
        for (which, timer) in (0u64..).zip(&mut timers) {
            let mut bytes = [0; 32];
            injection.call_reading(SYS_GETITIMER, [which, scratch, 0, 0, 0, 0], &mut bytes)?;
            for (word, bytes) in timer.iter_mut().zip(bytes.chunks_exact(8)) {
                let mut value = [0; 8];
                value.copy_from_slice(bytes);
                *word = u64::from_ne_bytes(value);
            }
        }
        for [_, _, seconds, microseconds] in
            timers.iter_mut().filter(|timer| timer[0] | timer[1] != 0)
        {
            // An expired periodic timer is armed again when its signal is taken, which nobody does in
            // a hold; the next expiration merges with the pending one.
            if *seconds | *microseconds == 0 {
                *microseconds = 1;
            }
        }
        let runs = timers.iter().any(|timer| timer[2] | timer[3] != 0);
        Ok(runs.then_some(IntervalTimersImage { pid: inner, timers }))
    }

    /// Starts the timers again.
    pub fn restore(&self, stub: &Stub) -> Result<()> {
        for (which, timer) in (0u64..).zip(&self.timers) {
            let bytes: Vec<u8> = timer.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let address = stub.put(0, &bytes)?;
            stub.run_all(&[Call::new(SYS_SETITIMER, [which, address, 0])])?;
        }
        Ok(())
    }
}
