//! `crcoord kill`: ends all processes of a job and proves it.

use std::process::ExitCode;

use crcoord_common::wire::client::{Event, Request};

use crate::arguments::JobArgument;
use crate::client::{ask, unexpected};
use crate::context::Context;
use crate::failure::Outcome;
use crate::{block_on, output};

/// Arguments of `kill`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let job = self.job.resolve()?;
        let request = Request::Kill { job: job.clone() };
        match block_on(ask(context.socket(), &request))? {
            Event::Done if context.json => output::json("killed", job)?,
            Event::Done => output::message(&format!("job {job}: all processes have ended")),
            other => return Err(unexpected(&other)),
        }
        Ok(ExitCode::SUCCESS)
    }
}
