//! Another agent's store over a bulk stream: putting a part while it is captured, fetching one at
//! restart. The other end is `bulk_server`.
//!
//! Stores block and streams do not: the blocking side hands over through bounded channels.

mod fetch;
mod put;

use crcoord_common::report::{Class, Report};
use crcoord_store::StoreError;
use crcoord_transport::FrameError;

pub use fetch::{Fetched, RemoteSource};
pub use put::RemotePart;

/// Chunks that wait to be sent, each at most 64 KiB.
const CHUNKS_WAITING: usize = 64;
/// Most ids in one message.
pub const IDS_AT_ONCE: usize = 4096;

/// A transfer that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TransferError(pub Report);

impl From<FrameError> for TransferError {
    fn from(error: FrameError) -> Self {
        TransferError(error.report())
    }
}

impl From<StoreError> for TransferError {
    fn from(error: StoreError) -> Self {
        TransferError(error.report())
    }
}

fn broken_off() -> Report {
    Report::new(
        "agent-partner-ended",
        Class::Unreachable,
        "the partner ended the transfer",
    )
    .remedy("look into the partner agent's log")
}
