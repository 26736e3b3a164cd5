//! Starting processes with exactly the descriptors they are meant to have, forking, and the few
//! process-wide calls a capsule's PID 1 needs.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A program that [`Spawn::start`] starts: no descriptor, variable, signal mask or ignored signal
/// of the caller reaches it unless it is named here.
#[derive(Debug)]
pub struct Spawn<'a> {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    descriptors: Vec<BorrowedFd<'a>>,
    new_session: bool,
}

/// A started process.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid in the caller's PID namespace.
    pub pid: i32,
    /// Its pidfd: readable once it has ended (`pidfd_open(2)`, Linux 5.3).
    pub pidfd: OwnedFd,
}

impl<'a> Spawn<'a> {
    /// A program by its path, with its whole argument list and environment (`NAME=VALUE`).
    ///
    /// # Errors
    /// `InvalidInput` where a text holds a zero byte.
    pub fn new(program: &str, arguments: &[&str], environment: &[String]) -> io::Result<Self> {
        let text = |text: &str| CString::new(text).map_err(io::Error::from);
        Ok(Spawn {
            program: text(program)?,
            arguments: arguments
                .iter()
                .map(|one| text(one))
                .collect::<io::Result<_>>()?,
            environment: environment
                .iter()
                .map(|one| text(one))
                .collect::<io::Result<_>>()?,
            descriptors: Vec::new(),
            new_session: false,
        })
    }

    /// Its descriptors 0, 1, 2 and so on, in order; everything above is closed.
    #[must_use]
    pub fn descriptors(mut self, descriptors: Vec<BorrowedFd<'a>>) -> Self {
        self.descriptors = descriptors;
        self
    }

    /// Makes it the leader of a session of its own.
    #[must_use]
    pub fn new_session(mut self) -> Self {
        self.new_session = true;
        self
    }

    /// Starts it by `posix_spawn(3)`, which is safe in a process with threads and reports a failed
    /// exec as an error (glibc 2.34 for closing what is not named).
    ///
    /// # Errors
    /// What the kernel said; no process is left then.
    pub fn start(&self) -> io::Result<Spawned> {
        // Duplicates above all targets, so that setting up one target never closes the source of a
        // later one.
        let floor = self.descriptors.len() as RawFd;
        let sources = self
            .descriptors
            .iter()
            .map(|descriptor| duplicate_above(*descriptor, floor))
            .collect::<io::Result<Vec<_>>>()?;
        let mut actions = FileActions::new()?;
        for (source, target) in sources.iter().zip(0..) {
            actions.duplicate(source.as_raw_fd(), target)?;
        }
        actions.close_from(floor)?;
        let attributes = Attributes::new(self.new_session)?;
        let pointers = |texts: &[CString]| {
            let mut list: Vec<_> = texts.iter().map(|text| text.as_ptr().cast_mut()).collect();
            list.push(std::ptr::null_mut());
            list
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut pid = 0;
        // SAFETY: all pointers are to values that outlive the call, the two lists are
        // NULL-terminated lists of NUL-terminated strings, and actions and attributes were
        // initialised by their constructors.
        let outcome = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                self.program.as_ptr(),
                &raw const actions.0,
                &raw const attributes.0,
                arguments.as_ptr(),
                environment.as_ptr(),
            )
        };
        checked(outcome)?;
        // The child is ours and not waited for yet, so the pid cannot have been given away.
        let pidfd = pidfd_open(pid)?;
        Ok(Spawned { pid, pidfd })
    }
}

/// Opens a pidfd of a process (`pidfd_open(2)`, Linux 5.3).
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn duplicate_above(descriptor: BorrowedFd<'_>, floor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an int and touches no memory of ours.
    let fd = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, floor) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

struct FileActions(libc::posix_spawn_file_actions_t);

impl FileActions {
    fn new() -> io::Result<Self> {
        // SAFETY: the structure is plain data that the next call initialises.
        let mut actions = FileActions(unsafe { std::mem::zeroed() });
        // SAFETY: the pointer is to a structure of the right type.
        checked(unsafe { libc::posix_spawn_file_actions_init(&raw mut actions.0) })?;
        Ok(actions)
    }

    fn duplicate(&mut self, source: RawFd, target: RawFd) -> io::Result<()> {
        // SAFETY: the structure is initialised; the descriptors are only noted.
        checked(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, source, target) })
    }

    fn close_from(&mut self, first: RawFd) -> io::Result<()> {
        // SAFETY: the structure is initialised; the number is only noted.
        checked(unsafe { libc::posix_spawn_file_actions_addclosefrom_np(&raw mut self.0, first) })
    }
}

impl Drop for FileActions {
    fn drop(&mut self) {
        // SAFETY: the structure is initialised and not used afterwards.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    /// Empty signal mask, every signal at its default.
    fn new(new_session: bool) -> io::Result<Self> {
        // SAFETY: the structure is plain data that the next call initialises.
        let mut attributes = Attributes(unsafe { std::mem::zeroed() });
        // SAFETY: the pointer is to a structure of the right type.
        checked(unsafe { libc::posix_spawnattr_init(&raw mut attributes.0) })?;
        let session = if new_session {
            libc::POSIX_SPAWN_SETSID.into()
        } else {
            0
        };
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | session;
        let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: the signal sets are plain data that sigemptyset and sigfillset initialise before
        // they are read; the structure is initialised.
        unsafe {
            let (mut none, mut all) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&raw mut none);
            libc::sigfillset(&raw mut all);
            checked(libc::posix_spawnattr_setsigmask(
                &raw mut attributes.0,
                &raw const none,
            ))?;
            checked(libc::posix_spawnattr_setsigdefault(
                &raw mut attributes.0,
                &raw const all,
            ))?;
            checked(libc::posix_spawnattr_setflags(&raw mut attributes.0, flags))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: the structure is initialised and not used afterwards.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

/// The posix_spawn family returns the errno instead of setting it.
fn checked(outcome: i32) -> io::Result<()> {
    match outcome {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the child's pid as the caller's PID namespace counts it.
    Parent(i32),
}

/// Forks a process that has one thread only (`fork(2)`).
///
/// # Errors
/// `Unsupported` when there are more threads, whose locks would stay held in the child; else what
/// the kernel said.
pub fn fork_single_threaded() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "a process with several threads is not forked",
        ));
    }
    fork_only_thread()
}

/// As [`fork_single_threaded`] for a PID 1 whose /proc may not show itself yet.
///
/// # Errors
/// `Unsupported` when the caller is not PID 1 of its namespace; else what the kernel said.
pub fn fork_from_init() -> io::Result<Fork> {
    if std::process::id() != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the caller is not PID 1",
        ));
    }
    // PID 1 is the result of a fork of a single-threaded process, and `crcoord capsule` starts no
    // thread; Threads of the status file is only readable once /proc is mounted.
    fork_only_thread()
}

fn fork_only_thread() -> io::Result<Fork> {
    // SAFETY: the caller has made sure that there is one thread, so the child may do whatever the
    // parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Blocks the signals for the calling thread and gives a descriptor that is readable while one of
/// them is pending (`signalfd(2)`); it is close-on-exec and does not block.
///
/// # Errors
/// What the kernel said.
pub fn signal_descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is plain data that sigemptyset initialises; the other calls only read it.
    let fd = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks no signal for the calling thread, as a program expects to be started.
///
/// # Errors
/// What the kernel said.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: the set is plain data that sigemptyset initialises; sigprocmask only reads it.
    let outcome = unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sends a signal to every other process of the caller's PID namespace; only PID 1 may
/// (`kill(2)` with pid -1).
///
/// # Errors
/// `Unsupported` when the caller is not PID 1; ESRCH, meaning nobody was there, is no error.
pub fn signal_everybody_else(signal: i32) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the caller is not PID 1",
        ));
    }
    // SAFETY: kill(2) takes no pointers.
    match unsafe { libc::kill(-1, signal) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Takes a descriptor that the process was started with under this number. The first call for a
/// number gets it, every later one `None`: so nobody owns it twice.
///
/// # Errors
/// EBADF when there is no such descriptor; `InvalidInput` outside 3 to 63; `AlreadyExists` at the
/// second call.
pub fn inherited_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    if !(3..64).contains(&number) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not an inherited descriptor",
        ));
    }
    // SAFETY: F_GETFD touches no memory of ours.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // Whatever this process opens itself is close-on-exec: what is not came from its parent.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "not inherited, or taken",
        ));
    }
    if TAKEN.fetch_or(1 << number, Ordering::SeqCst) & (1 << number) != 0 {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "already taken",
        ));
    }
    // SAFETY: F_SETFD touches no memory of ours.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, was inherited, and is handed out once only.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a signal to a process by its pidfd (`pidfd_send_signal(2)`, Linux 5.1).
///
/// # Errors
/// ESRCH when it has ended and was waited for; EPERM.
pub fn signal_process(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the only pointer is null, which means an ordinary signal.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_spawned_program_has_what_was_named_and_nothing_else() {
        let null = File::open("/dev/null").unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let script = "ls /proc/self/fd | tr '\\n' ' ' >&3; echo \"$GREETING ${HOME-none}\" >&3";
        let spawn = Spawn::new(
            "/bin/sh",
            &["sh", "-c", script],
            &["GREETING=hello".to_owned()],
        );
        let spawned = spawn
            .unwrap()
            .descriptors(vec![
                null.as_fd(),
                null.as_fd(),
                null.as_fd(),
                theirs.as_fd(),
            ])
            .new_session()
            .start()
            .unwrap();
        drop(theirs);
        let mut said = String::new();
        ours.read_to_string(&mut said).unwrap();
        // 4 is the directory that ls reads.
        assert_eq!(said, "0 1 2 3 4 hello none\n");
        wait(&spawned);
    }

    #[test]
    fn a_failed_start_is_an_error() {
        let error = Spawn::new("/nonexistent", &["x"], &[])
            .unwrap()
            .start()
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn sources_that_are_targets_of_others_survive() {
        let null = File::open("/dev/null").unwrap();
        let (mut one, first) = UnixStream::pair().unwrap();
        let (mut two, second) = UnixStream::pair().unwrap();
        let spawned = Spawn::new("/bin/sh", &["sh", "-c", "echo a >&3; echo b >&4"], &[])
            .unwrap()
            .descriptors(vec![
                null.as_fd(),
                null.as_fd(),
                null.as_fd(),
                second.as_fd(),
                first.as_fd(),
            ])
            .start()
            .unwrap();
        drop((first, second));
        let (mut a, mut b) = (String::new(), String::new());
        two.read_to_string(&mut a).unwrap();
        one.read_to_string(&mut b).unwrap();
        assert_eq!((a.as_str(), b.as_str()), ("a\n", "b\n"));
        wait(&spawned);
    }

    #[test]
    fn forking_with_threads_and_killing_all_are_refused_here() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || theirs.read(&mut [0]).unwrap());
        let error = fork_single_threaded().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert_eq!(
            fork_from_init().unwrap_err().kind(),
            io::ErrorKind::Unsupported
        );
        assert_eq!(
            signal_everybody_else(0).unwrap_err().kind(),
            io::ErrorKind::Unsupported
        );
        ours.write_all(b"x").unwrap();
        other.join().unwrap();
    }

    fn wait(spawned: &Spawned) {
        let mut status = 0;
        // SAFETY: the pointer is to an int that outlives the call.
        let pid = unsafe { libc::waitpid(spawned.pid, &raw mut status, 0) };
        assert_eq!((pid, status), (spawned.pid, 0));
    }
}
