//! Trees that ran before crcoord knew of them: who they belong to, whether they live, ending them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::member::Owner;
use crcoord_kernel::process_control::{pidfd_open, signal_process};
use rustix::process::Signal;

use crate::capsule::handle::wait_readable;

/// The root process of an adopted tree.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// Its pid.
    pub pid: i32,
    /// Its start, in clock ticks since boot.
    pub start: u64,
    /// Its pidfd.
    pub pidfd: Arc<OwnedFd>,
}

impl Adopted {
    /// Takes a running process.
    ///
    /// # Errors
    /// A report when there is none, or when the caller may not have it: anybody but root only his
    /// own, with all its uids.
    pub fn take(pid: i32, caller: u32) -> Result<(Self, Owner), Report> {
        let missing = |error: io::Error| {
            Report::new(
                "agent-adopt-missing",
                Class::NotFound,
                format!("no such process: {error}"),
            )
            .pid(pid)
            .errno(error.raw_os_error())
        };
        let pidfd = pidfd_open(pid).map_err(missing)?;
        let (owner, uids) = credentials(pid).map_err(missing)?;
        if caller != 0 && uids.iter().any(|uid| *uid != caller) {
            return Err(Report::new(
                "agent-adopt-denied",
                Class::Denied,
                format!("the process is not uid {caller}'s own"),
            )
            .pid(pid)
            .remedy("ask as the process's owner or as root"));
        }
        let start = start_of(pid).map_err(missing)?;
        Ok((
            Adopted {
                pid,
                start,
                pidfd: Arc::new(pidfd),
            },
            owner,
        ))
    }

    /// The same process after a restart of the agent; `None` when it has ended.
    pub fn find(pid: i32, start: u64) -> Option<Self> {
        let pidfd = pidfd_open(pid).ok()?;
        // Read after the pidfd was opened, so the number cannot have changed hands in between.
        (start_of(pid).ok()? == start).then(|| Adopted {
            pid,
            start,
            pidfd: Arc::new(pidfd),
        })
    }

    /// Ends the whole tree and waits until it is gone. Stopped first, so that nothing is forked
    /// while it is looked through.
    ///
    /// # Errors
    /// A report when something is still there in the end.
    pub fn kill(&self, patience: Duration) -> Result<(), Report> {
        let end = Instant::now() + patience;
        let mut known: BTreeMap<i32, OwnedFd> = BTreeMap::new();
        if wait_readable(&*self.pidfd, Duration::ZERO) {
            return Ok(());
        }
        loop {
            let mut pids = vec![self.pid];
            descendants(self.pid, &mut pids);
            let new: Vec<_> = pids
                .into_iter()
                .filter(|pid| !known.contains_key(pid))
                .collect();
            if new.is_empty() {
                break;
            }
            for pid in new {
                // One that has ended meanwhile needs no signal.
                if let Ok(pidfd) = pidfd_open(pid) {
                    let _ = signal_process(&pidfd, Signal::STOP.as_raw());
                    known.insert(pid, pidfd);
                }
            }
            if Instant::now() >= end {
                break;
            }
        }
        for pidfd in known.values() {
            let _ = signal_process(pidfd, Signal::KILL.as_raw());
        }
        for (pid, pidfd) in &known {
            if !wait_readable(pidfd, end.saturating_duration_since(Instant::now())) {
                return Err(Report::new(
                    "agent-kill-alive",
                    Class::TimedOut,
                    format!("a process did not end within {} s", patience.as_secs()),
                )
                .pid(*pid)
                .remedy("look for processes in state D on this node, then kill again"));
            }
        }
        Ok(())
    }
}

fn descendants(pid: i32, found: &mut Vec<i32>) {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return; // it has ended
    };
    for task in tasks.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children
            .split_ascii_whitespace()
            .filter_map(|child| child.parse().ok())
        {
            if !found.contains(&child) {
                found.push(child);
                descendants(child, found);
            }
        }
    }
}

/// Owner and all four uids of a process (`proc_pid_status(5)`).
fn credentials(pid: i32) -> io::Result<(Owner, Vec<u32>)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let numbers = |name: &str| -> Vec<u32> {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|rest| {
                rest.split_ascii_whitespace()
                    .filter_map(|one| one.parse().ok())
                    .collect()
            })
            .unwrap_or_default()
    };
    let (uids, gids, groups) = (numbers("Uid:"), numbers("Gid:"), numbers("Groups:"));
    match (uids.as_slice(), gids.as_slice()) {
        ([uid, _, _, _], [gid, _, _, _]) => Ok((
            Owner {
                uid: *uid,
                gid: *gid,
                groups,
            },
            uids,
        )),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Field 22 of /proc/PID/stat (`proc_pid_stat(5)`).
fn start_of(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is in brackets and may hold anything.
    let rest = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest)
        .unwrap_or_default();
    rest.split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_tree_is_taken_found_again_and_ended() {
        let mut child = Command::new("sh")
            .args([
                "-c",
                "trap '' TERM; sleep 1000 & (sleep 1000; true) & echo; wait",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let pid = child.id().cast_signed();
        let (adopted, owner) = Adopted::take(pid, 0).unwrap();
        assert_eq!(owner.uid, rustix::process::getuid().as_raw());
        assert_eq!(Adopted::take(pid, 4242).unwrap_err().class, Class::Denied);
        assert!(Adopted::find(pid, adopted.start).is_some());
        assert!(Adopted::find(pid, adopted.start + 1).is_none());
        let mut tree = Vec::new();
        descendants(pid, &mut tree);
        assert!(tree.len() >= 2, "{tree:?}");
        adopted.kill(Duration::from_secs(30)).unwrap();
        for one in tree {
            let state = fs::read_to_string(format!("/proc/{one}/stat")).unwrap_or_default();
            assert!(state.is_empty() || state.contains(") Z"), "{state}");
        }
        child.wait().unwrap();
        adopted.kill(Duration::from_secs(30)).unwrap();
    }
}
