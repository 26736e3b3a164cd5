//! The capsule: per member a small process that makes the member's namespaces and whose child is
//! PID 1 of them. It outlives agents; see `protocol` for how they talk.
//!
//! ```text
//! agent --spawn--> launcher --fork--> PID 1 --fork--> the program
//!   |  Order          |                 |
//!   |  <- Init{pid}   |                 | waits for the launcher's end
//!   |  pidfd, byte -> | exits           |
//!   |  <-------------------- Ready      | listens; serves Ask until Kill or its lease runs out
//! ```
//! The launcher's end makes PID 1 a child of the node's init: ending the agent never ends a job.

pub mod cgroup;
pub mod handle;
mod init;
mod launcher;
mod lease;
mod output;
mod program;
pub mod protocol;
mod streams;

pub use handle::{Capsule, CapsuleError};
pub use launcher::main;
