//! `crcoord demo` and its parts: a cluster of network namespaces on one machine, which tests use
//! too, and the story that is played in it.

mod cabling;
pub mod cluster;
mod display;
mod error;
mod init;
mod job;
mod node;
mod part;
mod story;
mod world;

pub use cluster::{Cluster, Options};
pub use error::DemoError;
pub(crate) use part::Part;
pub(crate) use story::StoryArguments;

use crate::failure::Outcome;

/// The whole demo, in a world of its own.
pub(crate) fn run(arguments: &StoryArguments, json: bool) -> Outcome {
    world::run(arguments, json)
}
