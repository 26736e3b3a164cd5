//! `crcoord list`: one line for every job.

use std::process::ExitCode;
use std::time::Duration;

use crcoord_common::hostlist::HostList;
use crcoord_common::units::format_duration;
use crcoord_common::wire::client::{Event, JobInfo, JobState, Request};

use crate::client::{ask, unexpected};
use crate::context::Context;
use crate::failure::Outcome;
use crate::{block_on, output, users};

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let jobs = match block_on(ask(context.socket(), &Request::List))? {
            Event::Jobs(jobs) => jobs,
            other => return Err(unexpected(&other)),
        };
        match context.json {
            true => output::json("jobs", jobs)?,
            false => output::print(&table(&jobs))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// All jobs as a table.
pub fn table(jobs: &[JobInfo]) -> String {
    let names = users::names_of(jobs.iter().map(|job| job.uid));
    let header = [
        "JOB",
        "USER",
        "STATE",
        ">LIFE",
        "NODES",
        ">EPOCHS",
        ">NEWEST",
        "RUN LEASE",
    ];
    let rows = jobs.iter().map(|job| {
        let nodes = job.placements.iter().map(|place| place.node.clone());
        let newest = job.epochs.last();
        vec![
            job.job.id.to_string(),
            names
                .get(&job.uid)
                .cloned()
                .unwrap_or_else(|| job.uid.to_string()),
            state(job),
            job.incarnation.to_string(),
            HostList::sorted(nodes).to_string(),
            job.epochs.len().to_string(),
            newest.map_or_else(|| "-".to_owned(), |info| info.epoch.to_string()),
            lease(job),
        ]
    });
    output::table(&header, rows)
}

/// The state in one word, with a checkpoint in progress.
pub fn state(job: &JobInfo) -> String {
    let state = match job.state {
        JobState::Running => "running",
        JobState::Restarting => "restarting",
        JobState::Unknown => "unknown",
        JobState::Ended => "ended",
    };
    match &job.open_epoch {
        Some((epoch, _)) => format!("{state}+epoch{epoch}"),
        None => state.to_owned(),
    }
}

/// The run lease, or `-` where the job has none.
pub fn lease(job: &JobInfo) -> String {
    job.run_lease_ms.map_or_else(
        || "-".to_owned(),
        |lease| format_duration(Duration::from_millis(lease)),
    )
}
