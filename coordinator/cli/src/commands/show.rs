//! `crcoord show`: one job with its members and its checkpoints.

use std::process::ExitCode;
use std::time::Duration;

use crcoord_common::units::{ByteSize, rounded_duration};
use crcoord_common::wire::client::{EpochInfo, Event, JobInfo, Request};
use crcoord_common::wire::member::ExitStatus;

use crate::arguments::JobArgument;
use crate::client::{ask, unexpected};
use crate::commands::list;
use crate::context::Context;
use crate::failure::Outcome;
use crate::progress::phase_text;
use crate::{block_on, output, users};

/// Arguments of `show`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let request = Request::Show {
            job: self.job.resolve()?,
        };
        let jobs = match block_on(ask(context.socket(), &request))? {
            Event::Jobs(jobs) => jobs,
            other => return Err(unexpected(&other)),
        };
        match context.json {
            true => output::json("jobs", jobs)?,
            false => {
                for job in &jobs {
                    output::print(&text(job))?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn text(job: &JobInfo) -> String {
    let names = users::names_of([job.uid]);
    let mut text = format!(
        "job        {}\nuser       {}\nstate      {}\nlife       {}\nrun lease  {}\n",
        job.job,
        names
            .get(&job.uid)
            .cloned()
            .unwrap_or_else(|| job.uid.to_string()),
        list::state(job),
        job.incarnation,
        list::lease(job),
    );
    if let Some((epoch, phase)) = &job.open_epoch {
        text.push_str(&format!(
            "in progress  epoch {epoch}: {}\n",
            phase_text(*phase)
        ));
    }
    let members = job.placements.iter().map(|place| {
        let ended = job.ended.iter().find(|(member, _)| *member == place.member);
        vec![
            place.member.to_string(),
            place.node.to_string(),
            place.address.to_string(),
            ended.map_or_else(|| "-".to_owned(), |(_, status)| ended_text(*status)),
        ]
    });
    text.push('\n');
    text.push_str(&output::table(
        &["MEMBER", "NODE", "ADDRESS", "ENDED"],
        members,
    ));
    if !job.epochs.is_empty() {
        text.push_str("\n\n");
        text.push_str(&output::table(
            &EPOCH_HEADER,
            job.epochs.iter().map(epoch_row),
        ));
    }
    text
}

const EPOCH_HEADER: [&str; 7] = [
    ">EPOCH",
    ">LIFE",
    "TAKEN (UTC)",
    ">LONGEST FREEZE",
    ">MEMORY",
    ">STORED",
    ">TOOK",
];

fn epoch_row(info: &EpochInfo) -> Vec<String> {
    let freeze = info.members.iter().map(|member| member.freeze_us).max();
    let taken = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(info.taken);
    vec![
        info.epoch.to_string(),
        info.incarnation.to_string(),
        crcoord_transport::pki::readable_time(taken).replace(" UTC", ""),
        rounded_duration(Duration::from_micros(freeze.unwrap_or(0))),
        ByteSize(info.members.iter().map(|member| member.raw_bytes).sum()).rounded(),
        ByteSize(info.members.iter().map(|member| member.stored_bytes).sum()).rounded(),
        rounded_duration(Duration::from_millis(info.total_ms)),
    ]
}

/// How a member ended, in words.
pub fn ended_text(status: ExitStatus) -> String {
    match status {
        ExitStatus::Exited(code) => format!("exit {code}"),
        ExitStatus::Signaled(signal) => format!("signal {signal}"),
        ExitStatus::Lost => "lost".to_owned(),
    }
}
