//! Tasks: status, stat, children, threads and descriptor numbers.

use std::fs;
use std::io;

use super::malformed;

/// Identities and capabilities of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective, saved and filesystem uid.
    pub uids: [u32; 4],
    /// Real, effective, saved and filesystem gid.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub capabilities: [u64; 5],
}

/// The lines of /proc/PID/status that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// State letter: R, S, D, T, t, Z, X, I.
    pub state: char,
    /// Thread group.
    pub process: i32,
    /// Parent.
    pub parent: i32,
    /// Tracer; 0 for none.
    pub tracer: i32,
    /// Identities.
    pub credentials: Credentials,
    /// File mode creation mask; `None` for a zombie.
    pub umask: Option<u32>,
    /// Pid in each PID namespace, from the reader's to the innermost.
    pub namespace_pids: Vec<i32>,
    /// Process group in the innermost namespace.
    pub process_group: i32,
    /// Session in the innermost namespace.
    pub session: i32,
    /// Caught signals, bit n-1 for signal n.
    pub caught: u64,
    /// Ignored signals.
    pub ignored: u64,
    /// Blocked signals of the thread.
    pub blocked: u64,
    /// Pending signals of the thread and of the process together.
    pub pending: u64,
    /// no_new_privs.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Threads in the process.
    pub threads: u32,
    /// Resident bytes.
    pub resident: u64,
}

impl Status {
    /// Reads it. `ESRCH` or `ENOENT` when the task is gone.
    pub fn read(pid: i32) -> io::Result<Status> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status"))?)
    }

    /// Reads a thread's.
    pub fn read_thread(pid: i32, tid: i32) -> io::Result<Status> {
        Self::parse(&fs::read_to_string(format!(
            "/proc/{pid}/task/{tid}/status"
        ))?)
    }

    /// True when the whole process has ended: a zombie main thread may have living siblings.
    pub fn is_dead(&self) -> bool {
        self.state == 'X' || (self.state == 'Z' && self.threads <= 1)
    }

    /// The pid in the innermost namespace.
    pub fn inner_pid(&self) -> i32 {
        self.namespace_pids.last().copied().unwrap_or(0)
    }

    fn parse(text: &str) -> io::Result<Status> {
        let mut status = Status::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            let bad = || malformed("status", line);
            let number = || value.parse::<i32>().map_err(|_| bad());
            let hex = || u64::from_str_radix(value, 16).map_err(|_| bad());
            let numbers = || -> io::Result<Vec<u32>> {
                value
                    .split_whitespace()
                    .map(|word| word.parse().map_err(|_| bad()))
                    .collect()
            };
            let four = || -> io::Result<[u32; 4]> { numbers()?.try_into().map_err(|_| bad()) };
            let innermost = || {
                value
                    .split_whitespace()
                    .last()
                    .and_then(|word| word.parse().ok())
                    .ok_or_else(bad)
            };
            let capabilities = &mut status.credentials.capabilities;
            match key {
                "State" => status.state = value.chars().next().ok_or_else(bad)?,
                "Tgid" => status.process = number()?,
                "PPid" => status.parent = number()?,
                "TracerPid" => status.tracer = number()?,
                "Uid" => status.credentials.uids = four()?,
                "Gid" => status.credentials.gids = four()?,
                "Groups" => status.credentials.groups = numbers()?,
                "Umask" => {
                    status.umask = Some(u32::from_str_radix(value, 8).map_err(|_| bad())?);
                }
                "NSpid" => {
                    status.namespace_pids = numbers()?.into_iter().map(|pid| pid as i32).collect();
                }
                "NSpgid" => status.process_group = innermost()?,
                "NSsid" => status.session = innermost()?,
                "SigPnd" | "ShdPnd" => status.pending |= hex()?,
                "SigBlk" => status.blocked = hex()?,
                "SigIgn" => status.ignored = hex()?,
                "SigCgt" => status.caught = hex()?,
                "CapInh" => capabilities[0] = hex()?,
                "CapPrm" => capabilities[1] = hex()?,
                "CapEff" => capabilities[2] = hex()?,
                "CapBnd" => capabilities[3] = hex()?,
                "CapAmb" => capabilities[4] = hex()?,
                "NoNewPrivs" => status.no_new_privs = value == "1",
                "Seccomp" => status.seccomp = number()? as u32,
                "Threads" => status.threads = number()? as u32,
                "VmRSS" => {
                    status.resident = value
                        .trim_end_matches(" kB")
                        .parse::<u64>()
                        .map_err(|_| bad())?
                        * 1024;
                }
                _ => {}
            }
        }
        Ok(status)
    }
}

/// The fields of /proc/PID/stat that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Name of the main thread, at most 15 bytes.
    pub name: String,
    /// Controlling terminal's device number; 0 for none.
    pub terminal: i32,
    /// Nice value.
    pub nice: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
    /// Code, data, stack, argument and environment bounds of its address space.
    pub start_code: u64,
    /// See `start_code`.
    pub end_code: u64,
    /// See `start_code`.
    pub start_stack: u64,
    /// Signal the parent gets at its end.
    pub exit_signal: i32,
    /// The CPU it last ran on.
    pub cpu: i32,
    /// Real-time priority.
    pub rt_priority: u32,
    /// Scheduling policy (sched(7)).
    pub policy: u32,
    /// See `start_code`.
    pub start_data: u64,
    /// See `start_code`.
    pub end_data: u64,
    /// See `start_code`.
    pub start_brk: u64,
    /// See `start_code`.
    pub arg_start: u64,
    /// See `start_code`.
    pub arg_end: u64,
    /// See `start_code`.
    pub env_start: u64,
    /// See `start_code`.
    pub env_end: u64,
    /// Wait status of a zombie, as waitpid(2) would give it.
    pub exit_code: i32,
}

impl Stat {
    /// Reads a process's.
    pub fn read(pid: i32) -> io::Result<Stat> {
        Self::parse(&fs::read(format!("/proc/{pid}/stat"))?)
    }

    /// Reads a thread's.
    pub fn read_thread(pid: i32, tid: i32) -> io::Result<Stat> {
        Self::parse(&fs::read(format!("/proc/{pid}/task/{tid}/stat"))?)
    }

    fn parse(bytes: &[u8]) -> io::Result<Stat> {
        let text = String::from_utf8_lossy(bytes);
        let bad = || malformed("stat", &text);
        let (open, close) = (
            text.find('(').ok_or_else(bad)?,
            text.rfind(')').ok_or_else(bad)?,
        );
        let name = text[open + 1..close].to_owned();
        // Field numbers as proc(5) counts them; the first after the name is 3.
        let fields: Vec<&str> = text[close + 1..].split_whitespace().collect();
        let unsigned = |number: usize| -> io::Result<u64> {
            fields
                .get(number - 3)
                .and_then(|field| field.parse().ok())
                .ok_or_else(bad)
        };
        let signed = |number: usize| -> io::Result<i32> {
            fields
                .get(number - 3)
                .and_then(|field| field.parse().ok())
                .ok_or_else(bad)
        };
        Ok(Stat {
            name,
            terminal: signed(7)?,
            nice: signed(19)?,
            started: unsigned(22)?,
            start_code: unsigned(26)?,
            end_code: unsigned(27)?,
            start_stack: unsigned(28)?,
            exit_signal: signed(38)?,
            cpu: signed(39)?,
            rt_priority: unsigned(40)? as u32,
            policy: unsigned(41)? as u32,
            start_data: unsigned(45)?,
            end_data: unsigned(46)?,
            start_brk: unsigned(47)?,
            arg_start: unsigned(48)?,
            arg_end: unsigned(49)?,
            env_start: unsigned(50)?,
            env_end: unsigned(51)?,
            exit_code: signed(52)?,
        })
    }
}

fn numbers(path: &str) -> io::Result<Vec<i32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path)? {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            all.push(number);
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// Thread ids of a process, ascending.
pub fn threads(pid: i32) -> io::Result<Vec<i32>> {
    numbers(&format!("/proc/{pid}/task"))
}

/// Descriptor numbers of a process, ascending.
pub fn descriptors(pid: i32) -> io::Result<Vec<i32>> {
    numbers(&format!("/proc/{pid}/fd"))
}

/// Soft and hard limits of a process by resource number (RLIMIT_CPU = 0 to RLIMIT_RTTIME = 15);
/// `u64::MAX` is no limit. Unlike prlimit(2) it needs no CAP_SYS_RESOURCE.
pub fn limits(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let mut all = Vec::new();
    for line in text.lines().skip(1) {
        // The name is padded to 26 columns, and each limit to 21.
        let value = |from: usize, to: usize| {
            let field = line.get(from..to.min(line.len())).unwrap_or("").trim();
            if field == "unlimited" {
                Some(u64::MAX)
            } else {
                field.parse().ok()
            }
        };
        match (value(26, 47), value(47, 68)) {
            (Some(soft), Some(hard)) => all.push((soft, hard)),
            _ => return Err(malformed("limits", line)),
        }
    }
    Ok(all)
}

/// Children of all threads of a process (CONFIG_PROC_CHILDREN), ascending. Exact only while the
/// process is stopped.
pub fn children(pid: i32) -> io::Result<Vec<i32>> {
    let mut all = Vec::new();
    for tid in threads(pid)? {
        let text = match fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(error) => return Err(error),
        };
        all.extend(
            text.split_whitespace()
                .filter_map(|word| word.parse::<i32>().ok()),
        );
    }
    all.sort_unstable();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_itself() {
        let pid = std::process::id() as i32;
        let status = Status::read(pid).unwrap();
        assert_eq!(status.process, pid);
        assert!(status.threads >= 1 && status.umask.is_some());
        let stat = Stat::read(pid).unwrap();
        assert!(stat.start_stack > stat.start_code && stat.arg_end >= stat.arg_start);
        assert!(threads(pid).unwrap().contains(&pid));
        assert!(descriptors(pid).unwrap().contains(&0));
        let limits = limits(pid).unwrap();
        assert_eq!(limits.len(), 16);
        for (resource, limit) in (0..16).zip(limits) {
            assert_eq!(limit, crate::sys::resource_limit(pid, resource).unwrap());
        }
    }

    #[test]
    fn names_may_hold_anything() {
        let line =
            b"7 (a) R (b) c) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 -5 1 0 99 0 0 0 1 2 3 0 0 0 0 \
                     0 0 0 0 0 17 1 0 0 0 0 0 4 5 6 7 8 9 10 0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(
            (stat.name.as_str(), stat.nice, stat.exit_signal),
            ("a) R (b) c", -5, 17)
        );
        assert_eq!((stat.start_data, stat.env_end), (4, 10));
    }
}
