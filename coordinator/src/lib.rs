//! The coordinator daemon as a library: agents over QUIC, commands over a unix socket, the journal;
//! all decisions are `crcoord-protocol`'s.
//!
//! ```text
//! agents.rs  --+                      +--> agents (one writer task per connection)
//! socket.rs  --+--> queue -> driver --+--> commands (one writer task per connection)
//! journal.rs --+    (one task owns    +--> journal (one thread; answers with Persisted)
//!                    the machine)
//! ```
//!
//! Absent on purpose: page bytes, any lock around the protocol's state, any decision about a job
//! outside the machine, permissions excepted (`permissions.rs`).
#![forbid(unsafe_code)]

mod agents;
mod caller;
mod clients;
mod clock;
mod daemon;
mod driver;
mod error;
mod journal;
mod permissions;
mod settings;
mod socket;

pub use daemon::{Daemon, run};
pub use error::CoordinatorError;
pub use settings::Settings;
