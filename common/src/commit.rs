//! The commit record: what makes an epoch valid. Journalled by the coordinator, copied beside every
//! part, and enough to rebuild a lost journal.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Incarnation, JobKey, Term};
use crate::image::ChunkId;
use crate::wire::member::{JobSpec, MemberCommit, Placement};

/// A committed epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommitRecord {
    /// The job.
    pub job: JobKey,
    /// The epoch.
    pub epoch: Epoch,
    /// The incarnation it was taken of.
    pub incarnation: Incarnation,
    /// The term of the coordinator that committed it.
    pub term: Term,
    /// When all members were held, in seconds since 1970-01-01 UTC.
    pub taken: u64,
    /// The job as it was asked for.
    pub spec: JobSpec,
    /// Where its members were.
    pub placements: Vec<Placement>,
    /// Each member's part, in member order.
    pub members: Vec<MemberCommit>,
}

/// A commit record that does not decode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the commit record is damaged: {0}")]
pub struct DamagedCommit(String);

impl CommitRecord {
    /// The record as bytes, followed by their BLAKE3 hash (32 bytes).
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = rmp_serde::to_vec_named(self)
            .expect("a commit record holds only data that MessagePack can express");
        let hash = ChunkId::of(&bytes);
        bytes.extend_from_slice(&hash.0);
        bytes
    }

    /// Checks the hash and decodes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DamagedCommit> {
        let Some((content, hash)) = bytes.split_last_chunk::<32>() else {
            return Err(DamagedCommit("it is too short".into()));
        };
        if ChunkId::of(content).0 != *hash {
            return Err(DamagedCommit("its hash does not match".into()));
        }
        rmp_serde::from_slice(content).map_err(|error| DamagedCommit(error.to_string()))
    }
}
