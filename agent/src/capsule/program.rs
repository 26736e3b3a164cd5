//! Starting the member's program as a child of PID 1: credentials, files, then exec.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command as Program, Stdio as Standard};

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::frame;
use crcoord_common::wire::member::{Command, Owner, Stdio};
use crcoord_kernel::process_control::{Fork, fork_from_init, unblock_signals};
use rustix::fs::Mode;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid, getgroups, umask};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::protocol::MESSAGE_LIMIT;
use super::streams::Stream;

/// A program between fork and exec.
#[derive(Debug)]
pub(super) struct Starting {
    /// Its pid.
    pub pid: i32,
    failure: File,
}

impl Starting {
    /// After the descriptor became readable: `None` when the exec succeeded.
    pub fn outcome(&mut self) -> Option<Report> {
        let mut bytes = Vec::new();
        match self.failure.read_to_end(&mut bytes) {
            Ok(0) => None,
            Ok(_) => Some(
                frame::read::<Report>(&mut &bytes[..], MESSAGE_LIMIT)
                    .ok()
                    .flatten()
                    .unwrap_or_else(|| {
                        refused("starting the program", &io::ErrorKind::InvalidData.into())
                    }),
            ),
            Err(error) => Some(refused("starting the program", &error)),
        }
    }
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.failure.as_fd()
    }
}

/// Forks the child that becomes the program.
pub(super) fn start(
    command: &Command,
    owner: &Owner,
    stdio: &Stdio,
    streams: &[Stream],
) -> io::Result<Starting> {
    let (failure, told) = pipe_with(PipeFlags::CLOEXEC)?;
    match fork_from_init()? {
        Fork::Parent(pid) => Ok(Starting {
            pid,
            failure: File::from(failure),
        }),
        Fork::Child => {
            let report = become_program(command, owner, stdio, streams);
            // Nobody is left to tell where PID 1 has died: the kernel ends this child then.
            let _ = frame::write(&mut File::from(told), &report, MESSAGE_LIMIT);
            std::process::exit(127)
        }
    }
}

/// Returns only when it failed.
fn become_program(command: &Command, owner: &Owner, stdio: &Stdio, streams: &[Stream]) -> Report {
    match prepare(command, owner, stdio, streams) {
        Ok(mut program) => {
            let error = program.exec();
            refused(&format!("starting {:?}", command.arguments[0]), &error)
                .path(command.arguments[0].clone())
                .remedy("give a program that exists on this node and may be executed by the owner")
        }
        Err(report) => report,
    }
}

fn prepare(
    command: &Command,
    owner: &Owner,
    stdio: &Stdio,
    streams: &[Stream],
) -> Result<Program, Report> {
    let [name, arguments @ ..] = command.arguments.as_slice() else {
        return Err(Report::new(
            "capsule-command",
            Class::Usage,
            "no program was named",
        ));
    };
    let in_step = |step: &'static str| move |error: rustix::io::Errno| refused(step, &error.into());
    rustix::process::setsid().map_err(in_step("setsid"))?;
    // PID 1 blocks what it reads by its signalfd, and exec keeps the mask.
    unblock_signals().map_err(|error| refused("unblocking signals", &error))?;
    // The agent's own protection from the OOM killer is not the program's.
    std::fs::write("/proc/self/oom_score_adj", "0")
        .map_err(|error| refused("resetting oom_score_adj", &error))?;
    let groups: Vec<_> = owner
        .groups
        .iter()
        .map(|group| Gid::from_raw(*group))
        .collect();
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    // This process has one thread, so what is set for it is set for all of it. An agent in a user
    // namespace without setgroups(2) can only start its own user's programs.
    if getgroups().map_err(in_step("getgroups"))? != groups {
        set_thread_groups(&groups).map_err(in_step("setgroups"))?;
    }
    set_thread_res_gid(gid, gid, gid).map_err(in_step("setresgid"))?;
    set_thread_res_uid(uid, uid, uid).map_err(in_step("setresuid"))?;
    umask(Mode::from_raw_mode(command.umask & 0o777));
    std::env::set_current_dir(&command.directory).map_err(|error| {
        refused("entering the working directory", &error)
            .path(command.directory.clone())
            .remedy("give a working directory that exists on this node")
    })?;
    let (output, error) = match stdio {
        Stdio::Files { output, error } => {
            let first = append_to(output)?;
            let second = match error == output {
                true => first
                    .try_clone()
                    .map_err(|error| refused("duplicating stdout", &error))?,
                false => append_to(error)?,
            };
            (first.into(), second.into())
        }
        Stdio::Caller => (end_of(streams, 1)?, end_of(streams, 2)?),
    };
    let mut program = Program::new(name);
    program
        .args(arguments)
        .env_clear()
        .envs(&command.environment)
        .stdin(Standard::null())
        .stdout(Standard::from(output))
        .stderr(Standard::from(error));
    Ok(program)
}

fn append_to(path: &str) -> Result<File, Report> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o666)
        .open(path)
        .map_err(|error| {
            refused("opening an output file", &error)
                .path(path)
                .remedy("name output files that the job's owner can write")
        })
}

fn end_of(streams: &[Stream], number: u8) -> Result<OwnedFd, Report> {
    let stream = streams.iter().find(|stream| stream.number == number);
    let writer = stream.and_then(|stream| stream.writer());
    let writer = writer.ok_or_else(|| {
        Report::new(
            "capsule-streams",
            Class::Failure,
            "the standard streams were given away",
        )
    })?;
    writer
        .try_clone_to_owned()
        .map_err(|error| refused("duplicating a stream", &error))
}

fn refused(step: &str, error: &io::Error) -> Report {
    Report::new("capsule-start", Class::Failure, format!("{step}: {error}"))
        .errno(error.raw_os_error())
}
