//! The coordinator's protocol as pure state machines: no clock, socket, thread, hash map or
//! randomness. STATES.md draws them.
//!
//! [`Coordinator`] is the whole state. It is told what happened (`handle`), asked what to do
//! (`poll_action`) and when it wants to be woken (`next_deadline`). What depends on a journal record
//! stays in its second queue until `Input::Persisted` confirms that record.
//!
//! Absent on purpose: page bytes, permissions (the daemon decides who may ask), the wire's framing.
#![forbid(unsafe_code)]

mod action;
mod addresses;
mod answers;
mod checkpoint;
mod commands;
mod commit;
mod coordinator;
mod core;
mod ending;
mod epoch;
mod fence;
mod hold;
mod job;
mod leadership;
mod nodes;
mod outbox;
mod placement;
mod probe;
mod record;
mod refusal;
mod replay;
mod requests;
mod restart;
mod restoring;
mod resync;
mod retention;
mod run_lease;
mod running;
mod settings;
mod survey;
mod time;
mod timers;
mod trees;
mod views;

pub use action::{Action, ClientId, Hello, Input, SessionId};
pub use addresses::{InvalidPool, Pool};
pub use coordinator::Coordinator;
pub use outbox::Sequence;
pub use record::{AdoptedOwner, CommittedEpoch, Record};
pub use settings::Settings;
pub use time::Millis;
pub use trees::Proof;
