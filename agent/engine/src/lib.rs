//! Capture and restore of one process tree. Knows no network and no store: pages go out through
//! [`PageSink`] and come in through [`PageSource`]; everything else is in the manifest's body.
//!
//! One kernel resource is one file in [`resources`], with both directions in it.
#![forbid(unsafe_code)]

pub mod capture;
pub mod error;
pub mod pages;
pub mod resources;
pub mod restore;
pub mod serve;
pub mod tree;

pub use error::EngineError;
pub use pages::{PageSink, PageSource};
