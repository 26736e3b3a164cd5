//! `crcoord restart`: restarts a job from a committed checkpoint.

use std::process::ExitCode;

use crcoord_common::hostlist::HostList;
use crcoord_common::ids::{Epoch, Incarnation, JobKey};
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::member::Placement;
use serde::Serialize;

use crate::arguments::JobArgument;
use crate::client::Client;
use crate::commands::run;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::progress::Progress;
use crate::{block_on, output};

/// Arguments of `restart`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    job: JobArgument,
    /// The checkpoint to restart from [default: the newest committed one]
    #[arg(long, value_name = "N")]
    epoch: Option<u64>,
    /// One node for each member, in their order [default: automatic placement]
    #[arg(long, value_name = "LIST")]
    nodes: Option<HostList>,
    /// Your word that the old members on these nodes are dead
    #[arg(long, alias = "confirmed-dead", value_name = "LIST")]
    confirm_dead: Option<HostList>,
    /// Stay until the job ends, print its output and return its status
    #[arg(long)]
    attach: bool,
}

/// What is printed once the job runs again.
#[derive(Serialize)]
struct Resumed {
    job: JobKey,
    incarnation: Incarnation,
    epoch: Epoch,
    lost_seconds: u64,
    placements: Vec<Placement>,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let job = self.job.resolve()?;
        let request = Request::Restart {
            job: job.clone(),
            epoch: self.epoch.map(Epoch),
            nodes: self.nodes.unwrap_or_default().0,
            confirmed_dead: self.confirm_dead.unwrap_or_default().0,
            attach: self.attach,
        };
        block_on(async {
            let mut client = Client::send(context.socket(), &request).await?;
            let mut progress = Progress::start(format!("restart of job {job}:"));
            loop {
                let event = client.next().await?;
                progress.show(&event);
                match event {
                    // A member that runs may speak before all others do.
                    Event::Output { stream, bytes, .. } => output::forward(stream, &bytes)?,
                    Event::Resumed {
                        job: key,
                        incarnation,
                        epoch,
                        lost_seconds,
                        placements,
                    } => {
                        drop(progress);
                        let resumed = Resumed {
                            job: key,
                            incarnation,
                            epoch,
                            lost_seconds,
                            placements,
                        };
                        resumed.tell(context, self.attach)?;
                        return match self.attach {
                            true => run::follow(context, &job, client).await,
                            false => Ok(ExitCode::SUCCESS),
                        };
                    }
                    _ => {}
                }
            }
        })
    }
}

impl Resumed {
    /// On standard output, or on standard error where that is the job's own.
    fn tell(&self, context: &Context, attached: bool) -> Result<(), Failure> {
        if context.json && !attached {
            return output::json("resumed", self);
        }
        let nodes = HostList(
            self.placements
                .iter()
                .map(|place| place.node.clone())
                .collect(),
        );
        let text = format!(
            "job {} resumed from epoch {} as life {} on {nodes}; {} s of work lost",
            self.job.id, self.epoch, self.incarnation, self.lost_seconds
        );
        match attached {
            true => output::message(&format!("crcoord: {text}")),
            false => output::print(&text)?,
        }
        Ok(())
    }
}
