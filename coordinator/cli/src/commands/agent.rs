//! `crcoord agent`: the daemon of a compute node.

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::logging;

/// Arguments of `agent`.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

impl Arguments {
    /// Runs until it is asked to stop.
    pub fn execute(self, context: &Context) -> Outcome {
        logging::start(context)?;
        Err(Failure::usage("this build has no agent"))
    }
}
