//! `crcoord run`: starts a program as a job and stays with it until it ends.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use crcoord_common::hostlist::HostList;
use crcoord_common::ids::{JobId, MemberId};
use crcoord_common::units::parse_duration;
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::member::{Command, ExitStatus, NetworkMode, Stdio};

use crate::arguments::JobArgument;
use crate::client::{Client, ask, unexpected};
use crate::commands::show::ended_text;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::{block_on, output, service};

/// Status of `run` where the program has none.
const NO_STATUS: u8 = 125;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
    /// One member runs on each of these nodes
    #[arg(long, value_name = "LIST", env = "SLURM_JOB_NODELIST")]
    nodes: HostList,
    /// The node's own network, or one of the member's own whose address moves with it
    #[arg(long, value_enum, default_value_t = Network::Host)]
    network: Network,
    /// A member that is cut off from the coordinator for this long ends itself
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    run_lease: Option<Duration>,
    /// File for standard output; %j is the job, %m the member, %n the node
    #[arg(long, value_name = "FILE")]
    output: Option<String>,
    /// File for standard error [default: the same as --output]
    #[arg(long, value_name = "FILE", requires = "output")]
    error: Option<String>,
    /// Return once the job runs; needs --output
    #[arg(long, requires = "output")]
    detach: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// In which network the members live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Network {
    /// The node's own.
    Host,
    /// A namespace of its own.
    Virtual,
}

impl Arguments {
    /// Does it. The status is the highest of the members'.
    pub fn execute(self, context: &Context) -> Outcome {
        let job = self.job.resolve()?;
        let run_lease_ms = self.run_lease.map(milliseconds).transpose()?;
        let request = Request::Run {
            job: job.clone(),
            nodes: self.nodes.0,
            command: of_caller(self.command)?,
            groups: groups_of_caller()?,
            stdio: match self.output {
                Some(output) => Stdio::Files {
                    error: self.error.unwrap_or_else(|| output.clone()),
                    output,
                },
                None => Stdio::Caller,
            },
            network: match self.network {
                Network::Host => NetworkMode::Host,
                Network::Virtual => NetworkMode::Virtual,
            },
            run_lease_ms,
            attach: !self.detach,
        };
        block_on(async {
            let mut client = Client::send(context.socket(), &request).await?;
            if !self.detach {
                // A member may speak, and even end, before all others are started.
                return follow(context, &job, client).await;
            }
            match client.next().await? {
                Event::JobStarted { job, placements } => match context.json {
                    true => output::json("started", (job, placements))?,
                    false => {
                        let nodes = placements.into_iter().map(|place| place.node).collect();
                        output::print(&format!("job {} started on {}", job.id, HostList(nodes)))?;
                    }
                },
                other => return Err(unexpected(&other)),
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// Forwards the job's output until it ends. SIGINT and SIGTERM end the job.
pub async fn follow(context: &Context, job: &JobId, mut client: Client) -> Outcome {
    let mut killed = false;
    let mut stop = Box::pin(service::asked_to_stop()?);
    loop {
        let event = tokio::select! {
            event = client.next() => event?,
            () = &mut stop, if !killed => {
                killed = true;
                output::message(&format!("crcoord: ending job {job}"));
                let request = Request::Kill { job: job.clone() };
                match ask(context.socket(), &request).await? {
                    Event::Done => continue,
                    other => return Err(unexpected(&other)),
                }
            }
        };
        match event {
            Event::Output { stream, bytes, .. } => output::forward(stream, &bytes)?,
            Event::MemberEnded { member, status } if status != ExitStatus::Exited(0) => {
                output::message(&format!("crcoord: member {member}: {}", ended_text(status)));
            }
            Event::JobEnded { statuses } => return Ok(status_of(&statuses).into()),
            _ => {}
        }
    }
}

/// The highest status of all members: their own, 128 + N for a signal, 125 for a lost one.
fn status_of(statuses: &[(MemberId, ExitStatus)]) -> u8 {
    let of_one = |status: &ExitStatus| match status {
        // The kernel keeps 8 bits of a status, and signals are below 65.
        ExitStatus::Exited(code) => (code & 0xff) as u8,
        ExitStatus::Signaled(signal) => 128 | (signal & 0x7f) as u8,
        ExitStatus::Lost => NO_STATUS,
    };
    let highest = statuses.iter().map(|(_, status)| of_one(status)).max();
    highest.unwrap_or(NO_STATUS)
}

fn milliseconds(lease: Duration) -> Result<u64, Failure> {
    match u64::try_from(lease.as_millis()) {
        Ok(lease) if lease > 0 => Ok(lease),
        _ => Err(Failure::usage("--run-lease must be at least a millisecond")),
    }
}

/// The program with this process's environment, directory and mask.
fn of_caller(arguments: Vec<String>) -> Result<Command, Failure> {
    let mut environment = BTreeMap::new();
    for (name, value) in std::env::vars_os() {
        let text = |text: std::ffi::OsString| {
            text.into_string().map_err(|text| {
                Failure::usage(format!(
                    "the environment holds {text:?}, which is not UTF-8"
                ))
            })
        };
        environment.insert(text(name)?, text(value)?);
    }
    let directory = std::env::current_dir()
        .map_err(|error| Failure::internal("cannot find the working directory", &error))?;
    let directory = directory
        .into_os_string()
        .into_string()
        .map_err(|path| Failure::usage(format!("the working directory {path:?} is not UTF-8")))?;
    Ok(Command {
        arguments,
        environment,
        directory,
        umask: umask_of_caller()?,
    })
}

/// From /proc, because umask(2) cannot be read without being changed (proc(5), Linux 4.7).
fn umask_of_caller() -> Result<u32, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| Failure::internal("cannot read /proc/self/status", &error))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))
        .and_then(|text| u32::from_str_radix(text.trim(), 8).ok())
        .ok_or_else(|| Failure::internal("/proc/self/status", &"it has no line Umask"))
}

/// Supplementary groups of this process.
pub fn groups_of_caller() -> Result<Vec<u32>, Failure> {
    let groups = rustix::process::getgroups()
        .map_err(|error| Failure::internal("cannot read the groups of this process", &error))?;
    Ok(groups.into_iter().map(|group| group.as_raw()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_status_counts() {
        let status = |statuses: &[ExitStatus]| {
            let members = (0..).map(MemberId);
            status_of(&members.zip(statuses.iter().copied()).collect::<Vec<_>>())
        };
        assert_eq!(status(&[ExitStatus::Exited(0), ExitStatus::Exited(0)]), 0);
        assert_eq!(status(&[ExitStatus::Exited(3), ExitStatus::Exited(0)]), 3);
        assert_eq!(
            status(&[ExitStatus::Exited(3), ExitStatus::Signaled(9)]),
            137
        );
        assert_eq!(status(&[ExitStatus::Lost, ExitStatus::Exited(1)]), 125);
        assert_eq!(status(&[]), 125);
    }

    #[test]
    fn the_caller_is_taken_from_the_process() {
        let command = of_caller(vec!["true".to_owned()]).unwrap();
        assert_eq!(
            command.environment.get("PATH"),
            std::env::var("PATH").ok().as_ref()
        );
        assert!(command.directory.starts_with('/'));
        assert!(command.umask <= 0o777);
        groups_of_caller().unwrap();
    }
}
