//! `crcoord checkpoint`: takes a consistent checkpoint of a job and waits for its commit.

use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use crcoord_common::ids::{JobId, NodeName};
use crcoord_common::units::{ByteSize, rounded_duration};
use crcoord_common::wire::client::{EpochInfo, Event, MemberFigures, Request};
use serde::Serialize;

use crate::arguments::JobArgument;
use crate::client::Client;
use crate::context::Context;
use crate::failure::{Failure, Outcome, lines};
use crate::progress::Progress;
use crate::{block_on, output};

/// Arguments of `checkpoint`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
    /// End the job once the checkpoint is committed
    #[arg(long)]
    kill: bool,
    /// Do not wait for the commit: print the epoch at once
    #[arg(long)]
    no_wait: bool,
    /// With --pid: adopt a process tree that runs on this node as the job
    #[arg(long, value_name = "NODE", requires = "pid")]
    node: Option<NodeName>,
    /// With --node: the root process of the tree
    #[arg(long, value_name = "PID", requires = "node", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Connections to peers outside the job: an obstacle, or reset when the job is restarted
    #[arg(long, value_name = "HOW", value_enum, default_value_t = ExternalTcp::Refuse)]
    external_tcp: ExternalTcp,
}

/// What to do about connections that leave the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ExternalTcp {
    /// They are reset at restart.
    Reset,
    /// They are an obstacle.
    Refuse,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let job = self.job.resolve()?;
        let request = Request::Checkpoint {
            job: job.clone(),
            adopt: self.node.zip(self.pid),
            kill: self.kill,
            wait: !self.no_wait,
            reset_external_tcp: self.external_tcp == ExternalTcp::Reset,
        };
        block_on(checkpoint(context, job, &request))
    }
}

async fn checkpoint(context: &Context, job: JobId, request: &Request) -> Outcome {
    let waits = matches!(request, Request::Checkpoint { wait: true, .. });
    let mut client = Client::send(context.socket(), request).await?;
    let mut progress = Progress::start(format!("checkpoint of job {job}:"));
    loop {
        let event = client.next().await?;
        progress.show(&event);
        match event {
            Event::Committed(info) => {
                drop(progress);
                committed(context, &job, &info)?;
                return Ok(ExitCode::SUCCESS);
            }
            Event::Opened { epoch } if !waits => {
                drop(progress);
                match context.json {
                    true => output::json("opened", Opened { job, epoch })?,
                    false => output::print(&epoch.to_string())?,
                }
                return Ok(ExitCode::SUCCESS);
            }
            _ => {}
        }
    }
}

#[derive(Serialize)]
struct Opened {
    job: JobId,
    epoch: crcoord_common::ids::Epoch,
}

#[derive(Serialize)]
struct Committed<'a> {
    job: &'a JobId,
    epoch: &'a EpochInfo,
}

fn committed(context: &Context, job: &JobId, info: &EpochInfo) -> Result<(), Failure> {
    for line in lines(&info.notes) {
        output::message(&format!("crcoord: note: {line}"));
    }
    if context.json {
        return output::json("committed", Committed { job, epoch: info });
    }
    output::print(&format!(
        "job {job} epoch {} committed after {}\n\n{}",
        info.epoch,
        rounded_duration(Duration::from_millis(info.total_ms)),
        figures_table(&info.members)
    ))
}

/// Freeze, bytes and rate of every member.
pub fn figures_table(members: &[MemberFigures]) -> String {
    let header = [
        ">MEMBER",
        "NODE",
        ">FREEZE",
        ">MEMORY",
        ">STORED",
        ">STREAMED IN",
        ">RATE",
    ];
    let rows = members.iter().map(|member| {
        vec![
            member.member.to_string(),
            member.node.to_string(),
            rounded_duration(Duration::from_micros(member.freeze_us)),
            ByteSize(member.raw_bytes).rounded(),
            ByteSize(member.stored_bytes).rounded(),
            rounded_duration(Duration::from_millis(member.stream_ms)),
            rate(member),
        ]
    });
    output::table(&header, rows)
}

/// Bytes of memory streamed each second.
fn rate(member: &MemberFigures) -> String {
    match member.stream_ms {
        0 => "-".to_owned(),
        milliseconds => {
            let per_second = u128::from(member.raw_bytes) * 1000 / u128::from(milliseconds);
            format!("{}/s", ByteSize(per_second as u64).rounded())
        }
    }
}
