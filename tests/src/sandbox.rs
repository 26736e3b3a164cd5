//! PID, mount and network namespaces for one test, with an init that reaps orphans. All processes in
//! them end with the value, also in a panic, and with the test itself.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crcoord_kernel::namespace::{Namespace, NamespaceKind, in_network_namespace, loopback_up};
use crcoord_kernel::sys;

use crate::{PATIENCE, binaries, eventually};

/// Bash reaps every child that it gets, and ends when the test closes its standard input. Its argument
/// is the pid before the first one that the namespace hands out.
const INIT: &str =
    r#"echo "$1" >/proc/sys/kernel/ns_last_pid && echo up; exec >/dev/null; read -r"#;

/// Namespaces hand out different pids, so that no engine's own pid is one that it has to restore.
static NAMESPACES: AtomicU32 = AtomicU32::new(0);
const FIRST_PID: u32 = 1000;
const PIDS_EACH: u32 = 1000;
/// Below the smallest `kernel.pid_max` (proc_sys_kernel(5)).
const MOST_NAMESPACES: u32 = 30;

/// Starts a program in the background, away from the caller's descriptors, as an orphan that the
/// init adopts. Arguments: directory of the streams, then the program.
const LAUNCH: &str = r#"
directory=$1; shift
cd "$directory" || exit
for entry in /proc/$$/fd/*; do
    number=${entry##*/}
    case $number in 0|1|2) ;; *) eval "exec $number>&-" ;; esac
done
"$@" <"$directory/stdin" >>"$directory/stdout" 2>>"$directory/stderr" &
echo $! >"$directory/pid"
"#;

const SIGKILL: i32 = 9;

/// Fresh namespaces: PID, mount (with a `/proc` of its own) and network (with `lo` up).
#[derive(Debug)]
pub struct Sandbox {
    unshare: Child,
    init: i32,
}

/// A program to be started in a [`Sandbox`].
#[derive(Debug)]
pub struct Program {
    line: Vec<OsString>,
    directory: PathBuf,
    user: Option<u32>,
}

impl Program {
    /// `program` with its standard streams in `directory`: `stdin` (made empty if absent), `stdout`,
    /// `stderr`; it works in that directory.
    pub fn new(program: impl AsRef<OsStr>, directory: &Path) -> Program {
        Program {
            line: vec![program.as_ref().to_owned()],
            directory: directory.to_owned(),
            user: None,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        let arguments = arguments.into_iter();
        self.line
            .extend(arguments.map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Runs it under this uid and gid, without further groups and capabilities.
    #[must_use]
    pub fn user(mut self, user: Option<u32>) -> Self {
        self.user = user;
        self
    }
}

impl Sandbox {
    /// Makes the namespaces.
    ///
    /// # Panics
    /// They cannot be made: this needs CAP_SYS_ADMIN.
    #[allow(
        clippy::new_without_default,
        reason = "what starts processes is not a default"
    )]
    pub fn new() -> Sandbox {
        // Built before anything is started whose time runs.
        binaries::crcoord();
        let number = NAMESPACES.fetch_add(1, Ordering::Relaxed) % MOST_NAMESPACES;
        let pid = FIRST_PID + number * PIDS_EACH;
        let mut unshare = Command::new("unshare")
            .args(["--pid", "--fork", "--mount", "--net"])
            .args(["--mount-proc", "bash", "-c", INIT, "init"])
            .arg(pid.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Read only when it fails: version 2.38 complains at its end about nothing.
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare (package util-linux) starts");
        let mut up = [0; 3];
        let mut output = unshare.stdout.take().expect("the stream was asked for");
        if output.read_exact(&mut up).is_err() {
            let said = unshare.wait_with_output().map(|output| output.stderr);
            let said = String::from_utf8_lossy(&said.unwrap_or_default()).into_owned();
            panic!("no namespaces: run the tests as root with CAP_SYS_ADMIN: {said}");
        }
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = fs::read_to_string(&children)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or_else(|| panic!("no init in {children}"));
        let sandbox = Sandbox { unshare, init };
        in_network_namespace(sandbox.network().as_fd(), loopback_up)
            .and_then(|outcome| outcome)
            .unwrap_or_else(|error| panic!("lo: {error}"));
        sandbox
    }

    /// The network namespace.
    ///
    /// # Panics
    /// The init is gone.
    pub fn network(&self) -> Namespace {
        Namespace::of_process(self.init, NamespaceKind::Network)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// A command inside, with this process's standard streams unless told otherwise.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.init))
            .args(["--pid", "--mount", "--net", "--"])
            .arg(program);
        command
    }

    /// Starts a program in a session of its own, with its standard streams as only descriptors, as a
    /// child of the namespace's init. Returns its pid as the namespace counts.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(&self, program: &Program) -> i32 {
        let directory = &program.directory;
        let input = directory.join("stdin");
        if !input.exists() {
            fs::write(&input, "").unwrap_or_else(|error| panic!("{}: {error}", input.display()));
        }
        let mut command = self.command("bash");
        command.args(["-c", LAUNCH, "bash"]).arg(directory);
        command.arg("setsid");
        if let Some(user) = program.user {
            command.arg("setpriv");
            command.args([format!("--reuid={user}"), format!("--regid={user}")]);
            command.args(["--clear-groups", "--"]);
        }
        let status = command
            .args(&program.line)
            .status()
            .expect("nsenter (package util-linux) starts");
        assert!(status.success(), "starting {:?}: {status}", program.line);
        let text = fs::read_to_string(directory.join("pid")).expect("the launcher wrote the pid");
        text.trim().parse().expect("the launcher writes a number")
    }

    /// The directory of a process in the namespace's own `/proc`.
    pub fn proc(&self, pid: i32) -> PathBuf {
        self.outside(Path::new("/proc")).join(pid.to_string())
    }

    /// Where a path inside lies as seen from the test, also beneath mounts made inside.
    pub fn outside(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix("/").unwrap_or(path);
        Path::new(&format!("/proc/{}/root", self.init)).join(path)
    }

    /// All processes but the init; zombies are among them.
    ///
    /// # Panics
    /// The init is gone.
    pub fn pids(&self) -> BTreeSet<i32> {
        fs::read_dir(self.outside(Path::new("/proc")))
            .unwrap_or_else(|error| panic!("the init of the namespace is gone: {error}"))
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != 1)
            .collect()
    }

    /// Waits until no process but the init is left.
    ///
    /// # Panics
    /// Some stay.
    pub fn await_empty(&self, what: &str) {
        self.await_pids(what, &BTreeSet::new());
    }

    /// Waits until these processes, and no others but the init, are there.
    ///
    /// # Panics
    /// Others stay, or some are missing.
    pub fn await_pids(&self, what: &str, expected: &BTreeSet<i32>) {
        let start = Instant::now();
        while self.pids() != *expected {
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not processes {expected:?} but {:#?}",
                self.threads()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// State letter and tracer of every thread of all processes but the init and zombies.
    pub fn threads(&self) -> Vec<ThreadState> {
        let mut threads = Vec::new();
        for pid in self.pids() {
            let Ok(entries) = fs::read_dir(self.proc(pid).join("task")) else {
                continue;
            };
            for entry in entries.flatten() {
                let Ok(status) = fs::read_to_string(entry.path().join("status")) else {
                    continue;
                };
                let field = |name: &str| {
                    status
                        .lines()
                        .find_map(|line| line.strip_prefix(name))
                        .map_or("", str::trim)
                        .to_owned()
                };
                let syscall = fs::read_to_string(entry.path().join("syscall"));
                threads.push(ThreadState {
                    pid,
                    name: field("Name:"),
                    system_call: syscall.unwrap_or_default().trim_end().to_owned(),
                    state: field("State:").chars().next().unwrap_or('?'),
                    traced: field("TracerPid:") != "0",
                });
            }
        }
        threads
    }

    /// Waits until no thread is traced or stopped any more.
    ///
    /// # Panics
    /// A thread stays traced or stopped.
    pub fn assert_runs(&self, what: &str) {
        eventually(&format!("{what}: nothing is traced or frozen"), || {
            self.threads()
                .iter()
                .all(|thread| !thread.traced && !matches!(thread.state, 't' | 'T'))
        });
    }

    /// Names of the nf_tables tables in the network namespace.
    ///
    /// # Panics
    /// `nft` is not installed or fails.
    pub fn firewall_tables(&self) -> String {
        let nft = binaries::installed("/usr/sbin/nft", "nftables");
        let output = self
            .command(nft)
            .args(["list", "tables"])
            .output()
            .expect("nsenter (package util-linux) starts");
        assert!(output.status.success(), "nft: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// What `/proc` says about a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadState {
    /// Its process.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// What it waits in (proc_pid_syscall(5)).
    pub system_call: String,
    /// The letter of its state (proc_pid_status(5)).
    pub state: char,
    /// Whether it has a tracer.
    pub traced: bool,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The init is not reaped before `unshare` is waited for, so that its pid is still its own.
        // If it is gone already, so is everything in the namespace.
        let _ = sys::kill(self.init, SIGKILL);
        let _ = self.unshare.wait();
    }
}
