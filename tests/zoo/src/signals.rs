//! Signal handlers, masks and queued signals.

use std::io;
use std::mem::MaybeUninit;

/// A handler in the three-argument form (`SA_SIGINFO`).
pub type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// A set of signals.
#[derive(Clone, Copy)]
pub struct Signals(libc::sigset_t);

impl Signals {
    /// The set of the given signals.
    pub fn of(signals: &[i32]) -> Signals {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the whole set.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for &signal in signals {
            // SAFETY: the set is initialised; a wrong number is refused.
            unsafe { libc::sigaddset(&mut set, signal) };
        }
        Signals(set)
    }

    /// Every signal.
    pub fn all() -> Signals {
        let mut set = Signals::of(&[]);
        // SAFETY: the set is initialised.
        unsafe { libc::sigfillset(&mut set.0) };
        set
    }

    /// The calling thread's mask.
    pub fn blocked() -> Signals {
        let mut set = Signals::of(&[]);
        // SAFETY: with a null new set only the old mask is written.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set.0) };
        set
    }

    /// What is pending for the calling thread or its process.
    pub fn pending() -> Signals {
        let mut set = Signals::of(&[]);
        // SAFETY: the set is valid for writing.
        unsafe { libc::sigpending(&mut set.0) };
        set
    }

    /// The numbers in the set, ascending.
    pub fn numbers(&self) -> Vec<i32> {
        // SAFETY: the set is initialised; sigismember only reads.
        (1..=64)
            .filter(|&signal| unsafe { libc::sigismember(&self.0, signal) } == 1)
            .collect()
    }

    /// Blocks these for the calling thread as well.
    pub fn block(&self) {
        self.change(libc::SIG_BLOCK);
    }

    /// Unblocks these for the calling thread.
    pub fn unblock(&self) {
        self.change(libc::SIG_UNBLOCK);
    }

    /// Makes this the calling thread's whole mask.
    pub fn replace_mask(&self) {
        self.change(libc::SIG_SETMASK);
    }

    /// For system calls that take a pointer.
    pub fn as_raw(&self) -> &libc::sigset_t {
        &self.0
    }

    /// Takes one pending signal of the set without waiting (`sigtimedwait` with a zero timeout).
    ///
    /// # Errors
    /// EAGAIN when none is pending.
    pub fn take_pending(&self) -> io::Result<libc::siginfo_t> {
        // SAFETY: all-zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            // SAFETY: all three pointers are valid for the call.
            if unsafe { libc::sigtimedwait(&self.0, &mut info, &at_once) } > 0 {
                return Ok(info);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn change(&self, how: i32) {
        // SAFETY: the set is initialised and the old mask is not asked for.
        unsafe { libc::pthread_sigmask(how, &self.0, std::ptr::null_mut()) };
    }
}

/// Installs a `SA_SIGINFO` handler with more `flags` and a mask for its run.
///
/// # Errors
/// As sigaction(2).
pub fn handle(signal: i32, handler: Handler, flags: i32, mask: &Signals) -> io::Result<()> {
    set_action(
        signal,
        handler as *const () as usize,
        flags | libc::SA_SIGINFO,
        mask,
    )
}

/// Ignores a signal.
///
/// # Errors
/// As sigaction(2).
pub fn ignore(signal: i32) -> io::Result<()> {
    set_action(signal, libc::SIG_IGN, 0, &Signals::of(&[]))
}

/// The disposition of a signal: handler address (or `SIG_DFL`, `SIG_IGN`), flags, mask.
///
/// # Errors
/// As sigaction(2).
pub fn action(signal: i32) -> io::Result<(usize, i32, Vec<i32>)> {
    // SAFETY: all-zero is a valid sigaction.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null new action only the old one is written.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &mut old) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((
        old.sa_sigaction,
        old.sa_flags,
        Signals(old.sa_mask).numbers(),
    ))
}

/// Queues a signal with a value to a process (`sigqueue`).
///
/// # Errors
/// As sigqueue(3).
pub fn queue_to_process(pid: libc::pid_t, signal: i32, value: usize) -> io::Result<()> {
    let value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    // SAFETY: the value is only passed along, never dereferenced.
    if unsafe { libc::sigqueue(pid, signal, value) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Queues a signal with a value to one thread of this process (`rt_tgsigqueueinfo(2)`).
///
/// # Errors
/// As rt_tgsigqueueinfo(2).
pub fn queue_to_thread(tid: libc::pid_t, signal: i32, value: usize) -> io::Result<()> {
    /// The layout of siginfo_t for `SI_QUEUE` on x86_64.
    #[repr(C)]
    struct Queued {
        signo: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: usize,
        rest: [u64; 12],
    }
    const _: () = assert!(size_of::<Queued>() == size_of::<libc::siginfo_t>());
    let pid = std::process::id() as i32;
    // SAFETY: getuid cannot fail.
    let uid = unsafe { libc::getuid() };
    let info = Queued {
        signo: signal,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid,
        uid,
        value,
        rest: [0; 12],
    };
    // SAFETY: info has the size and layout of a siginfo_t and is only read.
    let result = unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, &info) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_action(signal: i32, handler: usize, flags: i32, mask: &Signals) -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action.sa_mask = mask.0;
    // SAFETY: the action is complete; its handler only uses what a signal handler may use.
    if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
