//! The agent: per node the daemon that starts members in capsules, drives their engines, and moves
//! images between engine, stores and other agents. It never ptraces.
#![forbid(unsafe_code)]

mod bulk_server;
pub mod capsule;
mod capture;
mod check;
mod daemon;
mod dispatch;
mod engine_process;
pub mod image_key;
mod link;
mod members;
pub mod network;
mod node;
mod outbox;
mod own_image;
mod partner;
mod restore;
mod settings;
mod stream;

pub use daemon::{Agent, StartError, run};
pub use own_image::OwnImage;
pub use settings::{CoordinatorAddress, Settings};
