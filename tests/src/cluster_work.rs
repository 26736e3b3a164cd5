//! A job of zoo programs: one a member, with files of its own and its own verdict.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crcoord_zoo::driver::Run;

use crate::cluster::{CLUSTER_PATIENCE, Running, Site, until};

/// The programs of a job.
#[derive(Debug)]
pub struct Work {
    job: String,
    directory: PathBuf,
    runs: Vec<Run>,
    script: String,
}

/// Both sides of a stream and something else: the usual job.
pub const PAIR_AND_MEMORY: [&str; 3] = [
    "tcp_peer --listen $1:7000",
    "tcp_peer --connect $1:7000",
    "memory_private",
];

impl Work {
    /// For a job with this id: the program and flags of each member, in which `$1` is the first
    /// member's address, `$2` the second's and so on.
    ///
    /// # Panics
    /// No directory for it can be made.
    pub fn new(site: &Site, job: &str, programs: &[&str]) -> Work {
        let directory = site.path(&format!("work-{job}"));
        let mut script =
            "IFS=,; set -- $CRCOORD_ADDRESSES; unset IFS; case $CRCOORD_MEMBER in".to_owned();
        let zoo = site.path("zoo");
        let mut runs = Vec::new();
        for (member, program) in programs.iter().enumerate() {
            let (name, flags) = program.split_once(' ').unwrap_or((program, ""));
            let files = directory.join(member.to_string());
            fs::create_dir_all(&files).expect("the directory is ours");
            // Jobs of any user.
            fs::set_permissions(&files, fs::Permissions::from_mode(0o777)).expect("it is ours");
            let run = Run::new(&files, name);
            let arguments = run.arguments().join(" ");
            script.push_str(&format!(
                " {member}) exec {} {arguments} {flags};;",
                zoo.display()
            ));
            runs.push(run);
        }
        script.push_str(" esac");
        Work {
            job: job.to_owned(),
            directory,
            runs,
            script,
        }
    }

    /// Types `crcoord run` and waits until every program stands.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn run(&self, site: &Site, flags: &str) -> Running {
        let words = format!("run --job {} {flags} -- sh -c", self.job);
        let running = site.begin_with(&words, &[&self.script], |_| {});
        self.await_ready();
        // A program may stand before its coordinator has heard of its start.
        until(&format!("job {} is started", self.job), || {
            site.crcoord(&format!("check --job {}", self.job)).code != 1
        });
        running
    }

    /// The script that is every member's program, for `sh -c`.
    pub fn script(&self) -> &str {
        &self.script
    }

    /// Waits until every program stands; their pids, as they see themselves.
    ///
    /// # Panics
    /// One fails before.
    pub fn await_ready(&self) -> Vec<i32> {
        let ready = self.runs.iter().map(|run| {
            run.await_ready(CLUSTER_PATIENCE)
                .unwrap_or_else(|failure| panic!("job {}: {failure}", self.job))
        });
        ready.collect()
    }

    /// Lets all programs verify themselves and requires `ok` of each.
    ///
    /// # Panics
    /// A verdict is another one, or there is none.
    #[track_caller]
    pub fn verify(&self) {
        for run in &self.runs {
            run.go().unwrap_or_else(|failure| panic!("{failure}"));
        }
        for (member, run) in self.runs.iter().enumerate() {
            run.await_result(CLUSTER_PATIENCE)
                .unwrap_or_else(|failure| panic!("job {}, member {member}: {failure}", self.job));
        }
    }

    /// Takes go and results away, for another life from an epoch before them.
    ///
    /// # Panics
    /// The files cannot be removed.
    pub fn forget_verdicts(&self) {
        for member in 0..self.runs.len() {
            for name in ["go", "result"] {
                let path = self.directory.join(member.to_string()).join(name);
                if path.exists() {
                    fs::remove_file(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                }
            }
        }
    }

    /// Requires that no program has given a verdict: one that was disturbed may see it by itself.
    ///
    /// # Panics
    /// One has.
    #[track_caller]
    pub fn assert_undisturbed(&self) {
        for member in 0..self.runs.len() {
            let path = self.directory.join(member.to_string()).join("result");
            if let Ok(verdict) = fs::read_to_string(&path) {
                panic!("job {}, member {member}: {verdict}", self.job);
            }
        }
    }

    /// All threads of a member's processes, as this process counts: pid, tid and state letter
    /// (proc_pid_stat(5)).
    pub fn threads(&self, member: usize) -> Vec<(i32, i32, char)> {
        let mark = self.directory.join(member.to_string());
        let mark = format!("{}/", mark.display());
        let mut threads = Vec::new();
        for pid in numbers(Path::new("/proc")) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            // Not the command that was typed and not the shell that knows all members.
            if !line.contains(&mark) || line.contains("case $CRCOORD_MEMBER") {
                continue;
            }
            for tid in numbers(Path::new(&format!("/proc/{pid}/task"))) {
                let stat =
                    fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
                let state = stat
                    .rsplit(") ")
                    .next()
                    .and_then(|rest| rest.chars().next());
                threads.extend(state.map(|state| (pid, tid, state)));
            }
        }
        threads
    }

    /// Whether every thread of a member is held by a tracer.
    pub fn is_frozen(&self, member: usize) -> bool {
        let threads = self.threads(member);
        !threads.is_empty() && threads.iter().all(|(_, _, state)| *state == 't')
    }

    /// Waits until no thread of any member is held by a tracer.
    ///
    /// # Panics
    /// One stays so.
    pub fn await_thaw(&self) {
        until(&format!("job {} runs", self.job), || {
            (0..self.runs.len()).all(|member| {
                self.threads(member)
                    .iter()
                    .all(|(_, _, state)| *state != 't')
            })
        });
    }

    /// Waits until no process of the job is left.
    ///
    /// # Panics
    /// One stays.
    pub fn await_end(&self) {
        until(&format!("the end of job {}", self.job), || {
            (0..self.runs.len()).all(|member| self.threads(member).is_empty())
        });
    }
}

fn numbers(directory: &Path) -> Vec<i32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
