//! System calls without a safe wrapper in the standard library: pidfds, kcmp, affinity, page size
//! and the like.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Bytes of a page.
pub fn page_size() -> u64 {
    // SAFETY: no memory is involved.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// The kernel's release (`uname -r`).
pub fn kernel_release() -> String {
    // SAFETY: all zero is a valid utsname, and uname fills it with terminated strings.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    // SAFETY: see above; the buffer lives until the end of this function.
    unsafe { CStr::from_ptr(name.release.as_ptr()) }
        .to_string_lossy()
        .into_owned()
}

/// A handle on a process that never names another one (pidfd_open(2), Linux 5.3).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A duplicate of another process's descriptor (pidfd_getfd(2), Linux 5.6).
pub fn pidfd_getfd(process: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

/// Sends a signal through a pidfd (pidfd_send_signal(2), Linux 5.1).
pub fn pidfd_send_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the siginfo pointer may be null.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// What kcmp(2) compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Compare {
    /// Open files behind two descriptors.
    File = 0,
    /// Address spaces.
    Memory = 1,
    /// Descriptor tables.
    Descriptors = 2,
    /// Root, working directory and umask.
    FileSystem = 3,
}

/// Orders two kernel objects; equal means the same object (kcmp(2)). For [`Compare::File`] the
/// last two arguments are descriptors, else 0.
pub fn kcmp(
    what: Compare,
    pid_a: i32,
    pid_b: i32,
    fd_a: i32,
    fd_b: i32,
) -> io::Result<std::cmp::Ordering> {
    // SAFETY: integers only.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid_a,
            pid_b,
            what as i32,
            i64::from(fd_a),
            i64::from(fd_b),
        )
    })?;
    Ok(match result {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        _ => std::cmp::Ordering::Greater,
    })
}

/// Address and length of a thread's robust futex list (get_robust_list(2)).
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: both results are live 64-bit words.
    check(unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid,
            &raw mut head,
            &raw mut length,
        )
    })?;
    Ok((head, length))
}

/// Soft and hard limit of another process; `u64::MAX` is no limit.
pub fn resource_limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: only reads the limit into a live struct.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            std::ptr::null::<libc::rlimit64>(),
            &raw mut limit,
        )
    })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Raises the calling process's soft limit of descriptors to the hard one; gives it.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = resource_limit(0, libc::RLIMIT_NOFILE)?;
    let limit = libc::rlimit {
        rlim_cur: hard,
        rlim_max: hard,
    };
    // SAFETY: reads a live struct.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(hard)
}

/// Nice value of a thread (-20 to 19).
pub fn nice(tid: i32) -> io::Result<i32> {
    // SAFETY: integers only; the raw call returns 20 - nice.
    let result = check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) })?;
    Ok(20 - result as i32)
}

/// Runs the calling thread on this CPU only, while it drives tracees there. Fails for a CPU it may
/// not use.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    // SAFETY: a cpu_set_t is plain bits; CPU_SET ignores numbers beyond its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    };
    set_affinity(&set)
}

/// The calling thread's CPUs, to be put back by [`CpuSet::apply`].
#[derive(Clone, Copy)]
pub struct CpuSet(libc::cpu_set_t);

impl std::fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CpuSet")
    }
}

impl CpuSet {
    /// What the calling thread may use now.
    pub fn current() -> io::Result<CpuSet> {
        // SAFETY: the struct is live and as large as stated.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            if libc::sched_getaffinity(0, std::mem::size_of_val(&set), &raw mut set) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(CpuSet(set))
        }
    }

    /// Lets the calling thread use these CPUs.
    pub fn apply(&self) -> io::Result<()> {
        set_affinity(&self.0)
    }
}

fn set_affinity(set: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: the struct is live and as large as stated.
    if unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(set), set) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends a signal to a process the caller started itself.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: integers only.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Duplicates a descriptor to the lowest free number that is at least `minimum`, close-on-exec.
pub fn duplicate_above(fd: BorrowedFd<'_>, minimum: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    own(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, minimum) }.into())
}

/// Duplicates a descriptor that this process was given by number (EBADF when there is none).
pub fn duplicate_number(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only; an invalid number is refused by the kernel.
    own(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }.into())
}

/// Opens a path as if `root` were the root directory (openat2(2), RESOLVE_IN_ROOT, Linux 5.6);
/// without one, as open(2) does. Close-on-exec is always set.
pub fn open_in_root(
    root: Option<BorrowedFd<'_>>,
    path: &str,
    flags: u32,
) -> io::Result<std::fs::File> {
    const RESOLVE_IN_ROOT: u64 = 0x10;
    let text = std::ffi::CString::new(path)?;
    let how = [
        u64::from(flags) | libc::O_CLOEXEC as u64,
        0,
        if root.is_some() { RESOLVE_IN_ROOT } else { 0 },
    ];
    let directory = root.map_or(libc::AT_FDCWD, |root| root.as_raw_fd());
    // SAFETY: the path is terminated and `how` is a live `struct open_how`.
    own(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            directory,
            text.as_ptr(),
            how.as_ptr(),
            std::mem::size_of_val(&how),
        )
    })
    .map(std::fs::File::from)
}
