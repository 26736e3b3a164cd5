//! Threads as the kernel sees them: ids, names, what they are blocked in, and bounded waiting.

use std::ffi::CStr;
use std::fs;
use std::time::Duration;

use crate::{Failure, Outcome};

/// Polls before [`eventually`] gives up. At 1 ms each this is half a minute of *running* time.
const PATIENCE: u32 = 30_000;

/// The kernel's id of the calling thread.
pub fn gettid() -> libc::pid_t {
    // SAFETY: gettid has no arguments and cannot fail.
    unsafe { libc::gettid() }
}

/// Sleeps a few milliseconds between two polls; may end early.
pub fn pause_briefly() {
    std::thread::sleep(Duration::from_millis(2));
}

/// Polls until the condition holds, bounded by a number of polls and not by a clock.
///
/// # Errors
/// It never held.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Outcome {
    for _ in 0..PATIENCE {
        if condition() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Failure::new(format!("never happened: {what}")))
}

/// Waits until a thread sleeps inside one of the given system calls (`/proc/PID/task/TID/syscall`).
///
/// # Errors
/// It never did.
pub fn await_blocked(pid: libc::pid_t, tid: libc::pid_t, calls: &[libc::c_long]) -> Outcome {
    let path = format!("/proc/{pid}/task/{tid}/syscall");
    eventually(
        &format!("thread {tid} blocked in system call {calls:?}"),
        || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let number = text
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok());
            number.is_some_and(|number: libc::c_long| calls.contains(&number))
        },
    )
}

/// Names the calling thread (at most 15 bytes are kept).
pub fn set_name(name: &CStr) {
    // SAFETY: PR_SET_NAME reads at most 16 bytes of a valid C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// The calling thread's name.
pub fn name() -> String {
    let mut buffer = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, which the buffer has.
    unsafe { libc::prctl(libc::PR_GET_NAME, buffer.as_mut_ptr()) };
    let length = buffer
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}
