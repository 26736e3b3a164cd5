//! Agent to agent: bulk streams that carry one part each. The header is a frame; chunk bodies follow
//! their own small frame as raw bytes.

use serde::{Deserialize, Serialize};

use crate::ids::PartKey;
use crate::image::ChunkId;
use crate::report::Report;

/// First frame of a bulk stream: what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BulkHeader {
    /// The sender puts a part into the receiver's store: frames of [`PutMessage`], answered by
    /// [`PutAnswer`].
    Put {
        /// [`super::WIRE_VERSION`].
        version: u16,
        /// The part.
        part: PartKey,
    },
    /// The sender wants a part: frames of [`FetchMessage`], answered by [`FetchAnswer`].
    Fetch {
        /// [`super::WIRE_VERSION`].
        version: u16,
        /// The part.
        part: PartKey,
    },
}

/// From the putting agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PutMessage {
    /// A chunk; `stored` raw bytes follow this frame.
    Chunk {
        /// Its id.
        id: ChunkId,
        /// Codec of the bytes, as in packs.
        codec: u8,
        /// Uncompressed length.
        raw: u32,
        /// Length of what follows.
        stored: u32,
    },
    /// Chunks the part refers to that the sender believes the receiver holds: answered by Missing.
    Known {
        /// Their ids, at most 4096.
        ids: Vec<ChunkId>,
    },
    /// The last message: the manifest of this length follows; seal the part.
    Seal {
        /// Length of the encoded manifest.
        manifest: u64,
    },
}

/// From the receiving agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PutAnswer {
    /// These of the known chunks are not here: send them.
    Missing {
        /// Their ids.
        ids: Vec<ChunkId>,
    },
    /// The part is durable.
    Sealed {
        /// Hash of the manifest.
        manifest: ChunkId,
    },
    /// It cannot be done; the stream ends.
    Failed(Report),
}

/// From the fetching agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FetchMessage {
    /// Send the manifest.
    Manifest,
    /// Send these chunks in this order.
    Chunks {
        /// At most 4096.
        ids: Vec<ChunkId>,
    },
}

/// From the agent that holds the part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FetchAnswer {
    /// The manifest of this length and the commit record of that length follow.
    Manifest {
        /// Length of the encoded manifest.
        manifest: u64,
        /// Length of the encoded commit record.
        record: u64,
    },
    /// A chunk; `stored` raw bytes follow this frame.
    Chunk {
        /// Its id.
        id: ChunkId,
        /// Codec of the bytes.
        codec: u8,
        /// Uncompressed length.
        raw: u32,
        /// Length of what follows.
        stored: u32,
    },
    /// It cannot be done; the stream ends.
    Failed(Report),
}
