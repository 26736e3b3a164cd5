//! What all zoo programs share: the contract with the harness, and safe wrappers around system calls.
//!
//! # The zoo
//! One multi-call binary, `zoo`. Each program holds one kernel noun (pipes, threads, shared memory ...)
//! in a known state, is frozen there, killed and restarted by a harness, and then checks *itself*:
//! the harness needs to know nothing about the noun.
//!
//! # Contract
//! `zoo NAME --ready FILE --go FILE --result FILE [--dir DIR] [flags of the program]`
//!
//! 1. The program sets its resource up. Files it needs are made in `--dir` (default: the directory
//!    of `--ready`), under names that begin with the noun.
//! 2. It writes `--ready` atomically (a temporary name, then a rename) with the line `PID NOUN`, and closes it.
//!    From here on nothing is open but stdio (which may be `/dev/null`) and what the noun is about.
//! 3. It waits until `--go` exists by calling `stat` every few milliseconds, and keeps *using* the
//!    resource while it waits where that is the point. It never looks at the distance between two clock readings.
//!    This is where the harness takes a checkpoint, kills the whole tree, and
//!    restarts it with the same pids in another PID namespace.
//! 4. Once `--go` exists it verifies itself, writes `ok` or `FAIL: reason` to `--result` (atomically) and exits 0 or 1.
//!
//! All paths are absolute. Waiting for something that must happen is bounded by a *count* of polls, so
//! that a broken restart ends in `FAIL: ...` and not in silence, however long the freeze was.
//!
//! Helper files of the contract itself are named after `--result` (`RESULT.note.*`: an ordering
//! between processes of a tree that needs no descriptor; `RESULT.reason.PID`: why a child failed).
//!
//! `zoo list` prints one line for each program, tab separated: name, fate, purpose. The *fate* says whether the first
//! engine must carry the noun through a restart ([`Fate::Supported`]) or may refuse it by name ([`Fate::Later`]).
//!
//! # Adding a noun
//! One file `src/programs/NOUN.rs` and one line in the table of `src/programs/mod.rs`. The control
//! run `tests/control.rs` finds it by itself: a program must pass without any checkpoint first.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod descriptors;
pub mod driver;
pub mod heat;
mod listing;
pub mod memory;
mod outcome;
pub mod pattern;
pub mod processes;
pub mod signals;
pub mod sockets;
mod stage;
pub mod tasks;

pub use listing::{Entry, Fate, parse_listing};
pub use outcome::{Explain, Failure, Outcome};
pub use stage::Stage;

/// One program of the zoo: a row of the table.
#[derive(Clone, Copy)]
pub struct Program {
    /// The noun, also the subcommand.
    pub name: &'static str,
    /// Whether the engine must support it already.
    pub fate: Fate,
    /// One line: what is kept and checked.
    pub purpose: &'static str,
    /// Sets up, waits for go and verifies.
    pub run: fn(&Stage) -> Outcome,
}
