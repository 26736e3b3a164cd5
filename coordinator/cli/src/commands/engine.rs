//! `crcoord engine`: capture and restore of one process tree alone, without daemons.

use crate::failure::{Failure, Outcome};

/// Arguments of `engine`.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

impl Arguments {
    /// Does it.
    pub fn execute(self) -> Outcome {
        Err(Failure::usage("this build has no engine"))
    }
}
