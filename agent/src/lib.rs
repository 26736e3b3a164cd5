//! The agent: per node the daemon that starts members in capsules, drives their engines, and moves
//! images between engine, stores and other agents. It never ptraces.
#![forbid(unsafe_code)]

pub mod capsule;
mod own_image;

pub use own_image::OwnImage;
pub mod image_key;
pub mod network;
mod settings;
pub use settings::{CoordinatorAddress, Settings};
