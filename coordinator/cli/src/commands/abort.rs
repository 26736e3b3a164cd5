//! `crcoord abort`: gives up the checkpoint that is being taken; the job runs on.

use std::process::ExitCode;

use crcoord_common::wire::client::{Event, Request};

use crate::arguments::JobArgument;
use crate::client::{ask, unexpected};
use crate::context::Context;
use crate::failure::Outcome;
use crate::{block_on, output};

/// Arguments of `abort`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let job = self.job.resolve()?;
        let request = Request::Abort { job: job.clone() };
        match block_on(ask(context.socket(), &request))? {
            Event::Done if context.json => output::json("aborted", job)?,
            Event::Done => output::message(&format!("job {job}: no checkpoint is being taken now")),
            other => return Err(unexpected(&other)),
        }
        Ok(ExitCode::SUCCESS)
    }
}
