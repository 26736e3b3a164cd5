//! Processes: their place in the tree, sessions and groups, names, directories, limits.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use crcoord_common::image::ImageRecord;
use crcoord_common::report::Report;
use crcoord_kernel::inject::Injection;
use crcoord_kernel::number::{
    SYS_FCHDIR, SYS_PERSONALITY, SYS_PRCTL, SYS_PRLIMIT64, SYS_SETPRIORITY, SYS_UMASK, flag,
};
use crcoord_kernel::proc::{self, Stat, Status};
use crcoord_kernel::stub::{Call, Stub};
use crcoord_kernel::sys::{self, Compare, kcmp};
use serde::{Deserialize, Serialize};

use super::files::{DELETED, open_as_owner};
use super::{RestoreContext, credentials};
use crate::error::{Result, failure, obstacle};
use crate::tree::{is_gone, main_thread_ended};

/// One process, without threads, memory and descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessImage {
    /// Pid inside the job.
    pub pid: i32,
    /// Parent inside the job; 0 for the roots.
    pub parent: i32,
    /// Process group; 0 when it is led by nobody in the tree.
    pub group: i32,
    /// Session; 0 when it is led by nobody in the tree.
    pub session: i32,
    /// Signal its parent gets at its end.
    pub exit_signal: i32,
    /// Wait status of a zombie; everything below means nothing then.
    pub zombie: Option<i32>,
    /// Working directory.
    pub directory: String,
    /// File mode creation mask.
    pub umask: u32,
    /// Soft and hard limits by resource number.
    pub limits: Vec<(u64, u64)>,
    /// OOM score adjustment.
    pub oom_score_adj: String,
    /// Whether it can be dumped (PR_GET_DUMPABLE).
    pub dumpable: u64,
    /// Signal at its parent's death.
    pub parent_death_signal: i32,
    /// Orphans below it become its children.
    pub subreaper: bool,
    /// Timer slack in nanoseconds.
    pub timer_slack: u64,
    /// Execution domain and its flags (personality(2)).
    pub personality: u32,
}

impl ImageRecord for ProcessImage {
    const KIND: &'static str = "process";
}

/// Namespaces a member of a tree shares with all others (pid and user alike).
const NAMESPACES: [&str; 7] = ["mnt", "net", "ipc", "uts", "user", "pid", "cgroup"];

/// Reasons why a process cannot be captured; the tree may run.
pub fn check(pids: &[i32], pid: i32) -> std::io::Result<Vec<Report>> {
    let status = Status::read(pid)?;
    if status.is_dead() {
        return Ok(Vec::new());
    }
    if status.state == 'Z' {
        return Ok(vec![main_thread_ended(pid)]);
    }
    let mut reports = check_threads(pid)?;
    let mut refuse = |code: &str, message: String, remedy: &str| {
        reports.push(obstacle(code, message).pid(pid).remedy(remedy));
    };
    let own_pid = std::process::id() as i32;
    if status.tracer != 0 && status.tracer != own_pid {
        let message = format!("is traced by process {}", status.tracer);
        refuse("engine-traced", message, "end the debugger or tracer first");
    }
    let stat = Stat::read(pid)?;
    let outer_sessions = sessions(pids);
    if stat.terminal != 0 && outer_sessions.contains(&status.session) {
        let message = "its session has a controlling terminal".to_owned();
        refuse(
            "engine-terminal",
            message,
            "start the program without a terminal (setsid)",
        );
    }
    let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}"));
    let root = link("root")?;
    if root.as_os_str() != "/" {
        refuse(
            "engine-chroot",
            format!("its root directory is {}", root.display()),
            "run the program without chroot",
        );
    }
    let directory = link("cwd")?;
    match directory.to_str() {
        Some(path) if path.ends_with(DELETED) => refuse(
            "engine-directory-gone",
            format!("its working directory {path} is gone"),
            "keep the working directory",
        ),
        Some(_) => {}
        None => refuse(
            "engine-path",
            "its working directory's path is not UTF-8".to_owned(),
            "use another directory",
        ),
    }
    if std::fs::read_to_string(format!("/proc/{pid}/timers")).is_ok_and(|text| !text.is_empty()) {
        refuse(
            "engine-posix-timer",
            "timers of timer_create(2) are not supported yet".to_owned(),
            "use setitimer(2) or timerfd",
        );
    }
    let first = pids[0];
    for name in NAMESPACES {
        let identity = |pid: i32| {
            std::fs::metadata(format!("/proc/{pid}/ns/{name}")).map(|ns| (ns.dev(), ns.ino()))
        };
        if identity(pid)? != identity(first)? {
            refuse(
                "engine-namespace",
                format!("is in another {name} namespace than the tree's first process"),
                "run the program without namespaces of its own",
            );
        }
    }
    if pids.contains(&status.parent) {
        for (what, name) in [
            (Compare::Memory, "memory"),
            (Compare::Descriptors, "descriptor table"),
            (Compare::FileSystem, "working directory"),
        ] {
            if kcmp(what, pid, status.parent, 0, 0).is_ok_and(std::cmp::Ordering::is_eq) {
                refuse(
                    "engine-shared-with-parent",
                    format!("shares its {name} with its parent {}", status.parent),
                    "use threads or fork",
                );
            }
        }
    }
    Ok(reports)
}

/// What must be true of every thread.
fn check_threads(pid: i32) -> std::io::Result<Vec<Report>> {
    let mut reports: Vec<Report> = Vec::new();
    for tid in proc::threads(pid)? {
        let status = match Status::read_thread(pid, tid) {
            Ok(status) => status,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        let mut found = credentials::check(pid, &status);
        if status.state == 'T' {
            found.push(
                obstacle("engine-stopped", "is stopped by a signal")
                    .pid(pid)
                    .remedy("let it go on (SIGCONT) before the checkpoint"),
            );
        }
        for (what, name) in [
            (Compare::Descriptors, "descriptor table"),
            (Compare::FileSystem, "working directory"),
        ] {
            if tid != pid && kcmp(what, pid, tid, 0, 0).is_ok_and(std::cmp::Ordering::is_ne) {
                let message = format!("a thread has a {name} of its own");
                found.push(
                    obstacle("engine-thread-unshared", message)
                        .pid(pid)
                        .tid(tid)
                        .remedy("run the program without unshare(2) in threads"),
                );
            }
        }
        found.retain(|report| !reports.contains(report));
        reports.extend(found);
    }
    Ok(reports)
}

fn sessions(pids: &[i32]) -> BTreeSet<i32> {
    pids.iter()
        .filter_map(|pid| Status::read(*pid).ok())
        .filter(|status| status.inner_pid() == status.session)
        .map(|status| status.session)
        .collect()
}

/// What a capture finds of all processes' places in the tree.
#[derive(Debug)]
pub struct Family {
    inner: BTreeSet<i32>,
    outer: std::collections::BTreeMap<i32, i32>,
}

impl Family {
    /// Of processes by pid in the engine's namespace, with their pid inside the job.
    pub fn new(inner: &std::collections::BTreeMap<i32, i32>) -> Self {
        Family {
            inner: inner.values().copied().collect(),
            outer: inner.clone(),
        }
    }

    fn known(&self, pid: i32) -> i32 {
        if self.inner.contains(&pid) { pid } else { 0 }
    }
}

impl ProcessImage {
    /// A zombie's image.
    pub fn zombie(pid: i32, family: &Family) -> Result<ProcessImage> {
        let gone = |error: std::io::Error| failure("reading a zombie", &error).pid(pid);
        let (status, stat) = (
            Status::read(pid).map_err(gone)?,
            Stat::read(pid).map_err(gone)?,
        );
        let mut image = Self::place(&status, &stat, family);
        image.zombie = Some(stat.exit_code);
        Ok(image)
    }

    fn place(status: &Status, stat: &Stat, family: &Family) -> ProcessImage {
        ProcessImage {
            pid: status.inner_pid(),
            parent: family.outer.get(&status.parent).copied().unwrap_or(0),
            group: family.known(status.process_group),
            session: family.known(status.session),
            exit_signal: stat.exit_signal,
            zombie: None,
            directory: String::new(),
            umask: 0,
            limits: Vec::new(),
            oom_score_adj: String::new(),
            dumpable: 1,
            parent_death_signal: 0,
            subreaper: false,
            timer_slack: 0,
            personality: 0,
        }
    }

    /// Reads a held process.
    pub fn capture(
        pid: i32,
        family: &Family,
        injection: &mut Injection<'_>,
    ) -> Result<ProcessImage> {
        let failed = |error: std::io::Error| failure("reading a process", &error).pid(pid);
        let (status, stat) = (
            Status::read(pid).map_err(failed)?,
            Stat::read(pid).map_err(failed)?,
        );
        let mut image = Self::place(&status, &stat, family);
        image.directory = std::fs::read_link(format!("/proc/{pid}/cwd"))
            .map_err(failed)?
            .to_string_lossy()
            .into_owned();
        image.umask = status.umask.unwrap_or(0o22);
        image.limits = proc::limits(pid).map_err(failed)?;
        image.oom_score_adj = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
            .map_err(failed)?
            .trim()
            .to_owned();
        let personality =
            std::fs::read_to_string(format!("/proc/{pid}/personality")).map_err(failed)?;
        image.personality = u32::from_str_radix(personality.trim(), 16)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let scratch = injection.scratch();
        let mut word = [0; 4];
        image.dumpable = injection.call(SYS_PRCTL, [flag::PR_GET_DUMPABLE, 0, 0, 0, 0, 0])? as u64;
        image.timer_slack =
            injection.call(SYS_PRCTL, [flag::PR_GET_TIMERSLACK, 0, 0, 0, 0, 0])? as u64;
        injection.call_reading(
            SYS_PRCTL,
            [flag::PR_GET_PDEATHSIG, scratch, 0, 0, 0, 0],
            &mut word,
        )?;
        image.parent_death_signal = i32::from_ne_bytes(word);
        injection.call_reading(
            SYS_PRCTL,
            [flag::PR_GET_CHILD_SUBREAPER, scratch, 0, 0, 0, 0],
            &mut word,
        )?;
        image.subreaper = i32::from_ne_bytes(word) != 0;
        Ok(image)
    }

    /// Opens the working directory in the engine, from which the stub inherits it.
    pub fn open_directory(&self, context: &RestoreContext<'_>) -> Result<OwnedFd> {
        const O_DIRECTORY: u32 = 0o200_000;
        const O_PATH: u32 = 0o10_000_000;
        let file = open_as_owner(context, &self.directory, O_DIRECTORY | O_PATH)?;
        sys::duplicate_above(std::os::fd::AsFd::as_fd(&file), context.descriptor_base)
            .map_err(|error| failure("duplicating a directory", &error).into())
    }

    /// Sets what needs the engine's rights still: directory, umask, priorities.
    pub fn restore_early(&self, stub: &Stub, directory: &OwnedFd) -> Result<()> {
        use std::os::fd::AsRawFd;
        let mut calls = vec![
            Call::new(SYS_FCHDIR, [directory.as_raw_fd() as u64]),
            Call::new(SYS_UMASK, [u64::from(self.umask)]),
            Call::new(SYS_PERSONALITY, [u64::from(self.personality)]),
            Call::new(
                SYS_PRCTL,
                [flag::PR_SET_TIMERSLACK, self.timer_slack, 0, 0, 0],
            ),
        ];
        if self.subreaper {
            calls.push(Call::new(
                SYS_PRCTL,
                [flag::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0],
            ));
        }
        stub.run_all(&calls)?;
        let path = format!("/proc/{}/oom_score_adj", stub.tid());
        let wanted: i32 = self.oom_score_adj.parse().unwrap_or(0);
        // Never better protected than an ordinary process, for an image is untrusted; nor than the
        // builder, which would need CAP_SYS_RESOURCE.
        let own = std::fs::read_to_string(&path)
            .map_err(|error| failure("reading oom_score_adj", &error))?;
        let least = own.trim().parse::<i32>().unwrap_or(0).max(0);
        std::fs::write(path, wanted.clamp(least, 1000).to_string())
            .map_err(|error| failure("setting oom_score_adj", &error))?;
        Ok(())
    }

    /// Sets the limits: the soft one always, the hard one where it is lower than the stub's own
    /// (raising needs CAP_SYS_RESOURCE).
    pub fn restore_limits(&self, stub: &Stub) -> Result<()> {
        let failed = |error: std::io::Error| failure("reading limits", &error);
        for (resource, (soft, hard)) in (0u64..).zip(&self.limits) {
            let (_, own) = sys::resource_limit(stub.tid(), resource as u32).map_err(failed)?;
            let hard = (*hard).min(own);
            let soft = (*soft).min(hard);
            let mut bytes = soft.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&hard.to_ne_bytes());
            let address = stub.put(0, &bytes)?;
            stub.run_all(&[Call::new(SYS_PRLIMIT64, [0, resource, address, 0])])?;
        }
        Ok(())
    }

    /// What comes last, when identities are taken on: they reset it.
    pub fn restore_late(&self, stub: &Stub) -> Result<()> {
        let mut calls = vec![Call::new(
            SYS_PRCTL,
            [
                flag::PR_SET_PDEATHSIG,
                self.parent_death_signal as u64,
                0,
                0,
                0,
            ],
        )];
        // 2 is a setting of the system, not of a program.
        if self.dumpable != 2 {
            calls.push(Call::new(
                SYS_PRCTL,
                [flag::PR_SET_DUMPABLE, self.dumpable, 0, 0, 0],
            ));
        }
        stub.run_all(&calls)?;
        Ok(())
    }
}

/// Sets a thread's nice value.
pub fn restore_nice(stub: &Stub, nice: i32) -> Result<()> {
    // PRIO_PROCESS of the calling thread.
    stub.run(&[Call::new(SYS_SETPRIORITY, [0, 0, nice as i64 as u64])])?;
    Ok(())
}
