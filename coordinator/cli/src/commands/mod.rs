//! The commands, one file each: arguments, the request, and how its answer is shown.

pub mod abort;
pub mod agent;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod coordinator;
pub mod engine;
pub mod kill;
pub mod list;
pub mod pki;
pub mod restart;
pub mod run;
pub mod show;
pub mod status;
