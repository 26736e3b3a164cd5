//! `crcoord demo` and its parts: a cluster of network namespaces on one machine, which tests use
//! too, and the story that is played in it.

mod cabling;
pub mod cluster;
mod error;
mod init;
mod node;

pub use cluster::{Cluster, Options};
pub use error::DemoError;
pub(crate) use init::{InitArguments, NodeArguments};
