//! Namespaces: kinds, identity, entering, creating, and the mounts a capsule needs.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A kind of namespace (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamespaceKind {
    /// Control groups (Linux 4.6).
    Cgroup,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Mounts.
    Mount,
    /// Network.
    Network,
    /// Process ids, of children.
    Pid,
    /// Monotonic and boot clocks, of children (Linux 5.6).
    Time,
    /// Users and capabilities.
    User,
    /// Host name.
    Uts,
}

impl NamespaceKind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Cgroup,
        Self::Ipc,
        Self::Mount,
        Self::Network,
        Self::Pid,
        Self::Time,
        Self::User,
        Self::Uts,
    ];

    /// The name below `/proc/PID/ns`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Time => "time",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }

    /// The `CLONE_NEW*` flag of clone(2), setns(2) and unshare(2).
    pub fn clone_flag(self) -> i32 {
        match self {
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Mount => libc::CLONE_NEWNS,
            Self::Network => libc::CLONE_NEWNET,
            Self::Pid => libc::CLONE_NEWPID,
            // Not in every libc: CLONE_NEWTIME of <linux/sched.h>.
            Self::Time => 0x80,
            Self::User => libc::CLONE_NEWUSER,
            Self::Uts => libc::CLONE_NEWUTS,
        }
    }
}

/// What goes wrong around namespaces and a capsule's mounts.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A file of `/proc/PID/ns` could not be opened or looked at.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The path.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{operation}: {source}")]
    Call {
        /// The call and its object, such as `setns(net)`.
        operation: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The dedicated thread could not be started, or what it ran panicked.
    #[error("the thread that entered the network namespace ended early: {reason}")]
    Thread {
        /// Why.
        reason: String,
    },
}

/// Identity of a namespace: equal exactly if it is the same namespace (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId {
    /// Device of the `nsfs` file.
    pub device: u64,
    /// Inode of the `nsfs` file.
    pub inode: u64,
}

/// An open namespace: keeps it alive, even without a process in it.
#[derive(Debug)]
pub struct Namespace {
    kind: NamespaceKind,
    file: File,
}

impl Namespace {
    /// Opens `/proc/PID/ns/KIND`; needs ptrace read access to the process.
    ///
    /// # Errors
    /// [`NamespaceError::Open`].
    pub fn of_process(pid: i32, kind: NamespaceKind) -> Result<Self, NamespaceError> {
        Self::open(kind, Path::new(&format!("/proc/{pid}/ns/{}", kind.name())))
    }

    /// Opens the calling thread's own.
    ///
    /// # Errors
    /// [`NamespaceError::Open`].
    pub fn current(kind: NamespaceKind) -> Result<Self, NamespaceError> {
        Self::open(
            kind,
            Path::new(&format!("/proc/thread-self/ns/{}", kind.name())),
        )
    }

    /// Opens a file that stands for a namespace of the kind, such as one kept by a bind mount.
    ///
    /// # Errors
    /// [`NamespaceError::Open`].
    pub fn open(kind: NamespaceKind, path: &Path) -> Result<Self, NamespaceError> {
        let file = File::open(path).map_err(|source| NamespaceError::Open {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self { kind, file })
    }

    /// Makes a fresh network namespace, its loopback down; it lives as long as the value (or a
    /// process in it).
    ///
    /// # Errors
    /// [`NamespaceError::Call`] without CAP_SYS_ADMIN, others as they say.
    pub fn fresh_network() -> Result<Self, NamespaceError> {
        on_dedicated_thread(|| {
            unshare(&[NamespaceKind::Network])?;
            Self::current(NamespaceKind::Network)
        })?
    }

    /// Its kind.
    pub fn kind(&self) -> NamespaceKind {
        self.kind
    }

    /// Its identity.
    ///
    /// # Errors
    /// [`NamespaceError::Call`].
    pub fn id(&self) -> Result<NamespaceId, NamespaceError> {
        let metadata = self
            .file
            .metadata()
            .map_err(|source| self.failed("fstat", source))?;
        Ok(NamespaceId {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    /// Moves the calling thread into it (setns(2)). For PID and time namespaces only later
    /// children are in it; a thread of a multi-threaded process cannot enter a user namespace.
    ///
    /// # Errors
    /// [`NamespaceError::Call`].
    pub fn enter(&self) -> Result<(), NamespaceError> {
        // SAFETY: setns(2) takes no pointers.
        let outcome = unsafe { libc::setns(self.file.as_raw_fd(), self.kind.clone_flag()) };
        check(outcome).map_err(|source| self.failed("setns", source))
    }

    fn failed(&self, call: &str, source: io::Error) -> NamespaceError {
        NamespaceError::Call {
            operation: format!("{call}({})", self.kind.name()),
            source,
        }
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Puts the calling thread into fresh namespaces (unshare(2)); for PID and time namespaces its
/// later children.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn unshare(kinds: &[NamespaceKind]) -> Result<(), NamespaceError> {
    let flags = kinds
        .iter()
        .fold(0, |flags, kind| flags | kind.clone_flag());
    // SAFETY: unshare(2) takes no pointers.
    let outcome = unsafe { libc::unshare(flags) };
    check(outcome).map_err(|source| {
        let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
        NamespaceError::Call {
            operation: format!("unshare({})", names.join(",")),
            source,
        }
    })
}

/// Runs `work` on a thread of its own inside the network namespace; the caller's thread stays
/// where it is. Sockets opened there belong to that namespace for ever.
///
/// # Errors
/// [`NamespaceError::Call`] if it cannot be entered (CAP_SYS_ADMIN over it is needed),
/// [`NamespaceError::Thread`].
pub fn in_network_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, NamespaceError> {
    let namespace = namespace.as_raw_fd();
    on_dedicated_thread(move || {
        // SAFETY: setns(2) takes no pointers; the caller's borrow keeps the descriptor open.
        let outcome = unsafe { libc::setns(namespace, libc::CLONE_NEWNET) };
        check(outcome).map_err(|source| failed("setns(net)", source))?;
        Ok(work())
    })?
}

fn on_dedicated_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, work)
            .map_err(|error| NamespaceError::Thread {
                reason: error.to_string(),
            })?
            .join()
            .map_err(|_| NamespaceError::Thread {
                reason: "a panic".to_owned(),
            })
    })
}

/// Brings `lo` of the calling thread's network namespace up; it then has 127.0.0.1/8 and ::1.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn loopback_up() -> Result<(), NamespaceError> {
    set_link("lo", true)
}

/// Brings an interface of the calling thread's network namespace up or down (netdevice(7)). What
/// sockets of the namespace would still send goes nowhere while it is down.
///
/// # Errors
/// [`NamespaceError::Call`]; ENODEV when there is none of this name.
pub fn set_link(name: &str, up: bool) -> Result<(), NamespaceError> {
    // SAFETY: socket(2) takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket).map_err(|source| failed(&format!("socket for {name}"), source))?;
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays for the terminating zero.
    let room = request.ifr_name.len() - 1;
    for (target, byte) in request.ifr_name.iter_mut().take(room).zip(name.as_bytes()) {
        *target = byte.cast_signed();
    }
    let flags = if up {
        libc::IFF_UP | libc::IFF_RUNNING
    } else {
        0
    };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq, whose name is NUL-terminated.
    let outcome = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    };
    check(outcome).map_err(|source| failed(&format!("SIOCSIFFLAGS {name}"), source))
}

/// Sets the host name of the calling thread's UTS namespace (sethostname(2)).
///
/// # Errors
/// [`NamespaceError::Call`]; EINVAL beyond 64 bytes.
pub fn set_host_name(name: &str) -> Result<(), NamespaceError> {
    // SAFETY: the pointer and length describe `name`, which is only read.
    let outcome = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    check(outcome).map_err(|source| failed(&format!("sethostname({name})"), source))
}

/// How mount events travel between this mount namespace and others (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Neither in nor out.
    Private,
    /// From the host in, nothing out.
    Slave,
}

/// Changes the propagation of every mount below and at `/` of the calling thread's mount
/// namespace.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn set_propagation(propagation: Propagation) -> Result<(), NamespaceError> {
    let kind = match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    mount(None, Path::new("/"), None, kind | libc::MS_REC)
}

/// Mounts a fresh procfs at `target`, over what is there; it shows the PID namespace of the caller.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn mount_proc(target: &Path) -> Result<(), NamespaceError> {
    mount(Some("proc"), target, Some("proc"), SAFE_MOUNT)
}

/// Mounts the message queues of the caller's IPC namespace at `target` (mq_overview(7)).
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn mount_mqueue(target: &Path) -> Result<(), NamespaceError> {
    mount(Some("mqueue"), target, Some("mqueue"), SAFE_MOUNT)
}

/// Mounts a fresh sysfs at `target`: it shows the devices of the caller's network namespace.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn mount_sysfs(target: &Path) -> Result<(), NamespaceError> {
    mount(Some("sysfs"), target, Some("sysfs"), SAFE_MOUNT)
}

/// Mounts an empty tmpfs at `target`.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn mount_tmpfs(target: &Path) -> Result<(), NamespaceError> {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        SAFE_MOUNT & !libc::MS_NOEXEC,
    )
}

/// Binds `source` and everything mounted below it to `target`.
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn bind_mount(source: &Path, target: &Path) -> Result<(), NamespaceError> {
    let name = source.to_string_lossy();
    if Path::new(name.as_ref()) != source {
        return Err(failed(
            "mount --rbind",
            io::Error::from_raw_os_error(libc::EILSEQ),
        ));
    }
    mount(Some(&name), target, None, libc::MS_BIND | libc::MS_REC)
}

/// Detaches what is mounted at `target` (umount2(2) with MNT_DETACH).
///
/// # Errors
/// [`NamespaceError::Call`].
pub fn detach_mount(target: &Path) -> Result<(), NamespaceError> {
    let path = c_path(target)?;
    // SAFETY: the path is NUL-terminated and only read.
    let outcome = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    check(outcome).map_err(|source| failed(&format!("umount {}", target.display()), source))
}

/// Makes the mount at `new_root` the root of the mount namespace and detaches the old one
/// (pivot_root(2), the form without a directory for the old root); the working directory is `/` then.
///
/// # Errors
/// [`NamespaceError::Call`]; EINVAL if `new_root` is not a mount point.
pub fn pivot_root(new_root: &Path) -> Result<(), NamespaceError> {
    let what = |call: &str| format!("{call} {}", new_root.display());
    std::env::set_current_dir(new_root).map_err(|source| failed(&what("chdir"), source))?;
    // SAFETY: both paths are NUL-terminated constants and only read.
    let outcome = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    check(if outcome < 0 { -1 } else { 0 })
        .map_err(|source| failed(&what("pivot_root"), source))?;
    detach_mount(Path::new("."))?;
    std::env::set_current_dir("/").map_err(|source| failed("chdir /", source))
}

const SAFE_MOUNT: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

fn mount(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: libc::c_ulong,
) -> Result<(), NamespaceError> {
    let what = || {
        let object = kind.or(source).unwrap_or("propagation");
        format!("mount {object} at {}", target.display())
    };
    let text = |text: Option<&str>| {
        text.map(CString::new)
            .transpose()
            .map_err(|_| failed(&what(), invalid()))
    };
    let (source, kind, path) = (text(source)?, text(kind)?, c_path(target)?);
    let pointer = |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
    // SAFETY: every pointer is null or a NUL-terminated string that outlives the call.
    let outcome = unsafe {
        libc::mount(
            pointer(&source),
            path.as_ptr(),
            pointer(&kind),
            flags,
            std::ptr::null(),
        )
    };
    check(outcome).map_err(|error| failed(&what(), error))
}

fn c_path(path: &Path) -> Result<CString, NamespaceError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| failed(&format!("path {}", path.display()), invalid()))
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn failed(operation: &str, source: io::Error) -> NamespaceError {
    NamespaceError::Call {
        operation: operation.to_owned(),
        source,
    }
}

fn check(outcome: i32) -> io::Result<()> {
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn a_fresh_network_is_another_one_and_the_caller_stays() {
        let own = Namespace::current(NamespaceKind::Network)
            .unwrap()
            .id()
            .unwrap();
        let fresh = Namespace::fresh_network()
            .expect("a_fresh_network_is_another_one_and_the_caller_stays needs CAP_SYS_ADMIN");
        assert_ne!(fresh.id().unwrap(), own);
        let seen = in_network_namespace(fresh.as_fd(), || {
            loopback_up().unwrap();
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            Namespace::current(NamespaceKind::Network)
                .unwrap()
                .id()
                .unwrap()
        });
        assert_eq!(seen.unwrap(), fresh.id().unwrap());
        assert_eq!(
            Namespace::current(NamespaceKind::Network)
                .unwrap()
                .id()
                .unwrap(),
            own
        );
    }

    #[test]
    fn every_kind_has_a_file_and_a_process_shares_its_own() {
        for kind in NamespaceKind::ALL {
            let own = Namespace::current(kind).unwrap();
            let same = Namespace::of_process(std::process::id().cast_signed(), kind).unwrap();
            assert_eq!(own.id().unwrap(), same.id().unwrap(), "{kind:?}");
            assert_eq!(own.kind(), kind);
        }
    }

    #[test]
    fn a_wrong_descriptor_is_an_error_with_the_call_named() {
        let file = File::open("/dev/null").unwrap();
        let error = in_network_namespace(file.as_fd(), || ()).unwrap_err();
        assert!(error.to_string().starts_with("setns(net)"), "{error}");
    }

    #[test]
    fn a_capsule_gets_its_own_root_mounts_and_name() {
        let before = std::fs::read_link("/proc/self/root").unwrap();
        let directory = std::env::temp_dir().join(format!("crcoord-pivot-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let seen = on_dedicated_thread(|| {
            unshare(&[NamespaceKind::Mount, NamespaceKind::Uts, NamespaceKind::Ipc])?;
            set_propagation(Propagation::Slave)?;
            set_propagation(Propagation::Private)?;
            set_host_name("capsule-7")?;
            mount_tmpfs(&directory)?;
            for name in ["proc", "mqueue", "sys"] {
                std::fs::create_dir(directory.join(name)).unwrap();
            }
            mount_proc(&directory.join("proc"))?;
            mount_mqueue(&directory.join("mqueue"))?;
            mount_sysfs(&directory.join("sys"))?;
            pivot_root(&directory)?;
            let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap();
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
            detach_mount(Path::new("/mqueue"))?;
            Ok::<_, NamespaceError>((mounts, name))
        });
        std::fs::remove_dir(&directory).unwrap();
        let (mounts, name) = seen
            .unwrap()
            .expect("a_capsule_gets_its_own_root_mounts_and_name needs CAP_SYS_ADMIN");
        assert_eq!(name.trim(), "capsule-7");
        assert_eq!(mounts.lines().count(), 4, "{mounts}");
        assert_eq!(std::fs::read_link("/proc/self/root").unwrap(), before);
    }
}
