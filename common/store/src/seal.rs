//! The seal: a small checked record beside each part that says it is whole, and which packs it needs.

use std::path::Path;

use crcoord_common::ids::{Epoch, PartKey};
use crcoord_common::image::ChunkId;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::files;

const MAGIC: [u8; 8] = *b"crcseal\0";
const VERSION: u16 = 1;
const MIN_READER: u16 = 1;
const HEADER_BYTES: usize = 12;
const HASH_BYTES: usize = 32;
/// Longest seal that is read, in bytes.
const LIMIT: u64 = 4 << 20;

/// What sealing a part gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The part.
    pub part: PartKey,
    /// Hash of the encoded manifest, as the commit record names it.
    pub manifest: ChunkId,
    /// Length of the encoded manifest, in bytes.
    pub manifest_bytes: u64,
    /// Hash over the header and table of the part's own pack.
    pub pack: ChunkId,
    /// Length of the part's own pack: what the part cost, in bytes.
    pub stored_bytes: u64,
    /// Uncompressed bytes of the chunks in it.
    pub raw_bytes: u64,
    /// How many chunks are in it.
    pub chunks: u64,
    /// What the part needs of each pack, its own included.
    pub uses: Vec<PackUse>,
}

/// What a part needs of one pack of its series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackUse {
    /// The epoch whose part wrote the pack.
    pub epoch: Epoch,
    /// Bytes of the pack's chunks that the part needs, as stored.
    pub bytes: u64,
}

/// Writes a new seal file, durable but for its name.
pub(crate) fn write(path: &Path, seal: &Sealed) -> Result<(), StoreError> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&MIN_READER.to_le_bytes());
    let body = rmp_serde::to_vec_named(seal)
        .expect("a seal holds only names and numbers, which MessagePack can express");
    bytes.extend_from_slice(&body);
    let hash = ChunkId::of(&bytes);
    bytes.extend_from_slice(&hash.0);
    files::write_new(path, &bytes)
}

/// Reads the seal of `part`; `None` where there is none.
pub(crate) fn read(path: &Path, part: &PartKey) -> Result<Option<Sealed>, StoreError> {
    let Some(bytes) = files::read_limited(path, LIMIT)? else {
        return Ok(None);
    };
    if bytes.len() < HEADER_BYTES + HASH_BYTES || bytes[..8] != MAGIC {
        return Err(StoreError::damaged(path, "it is no whole seal"));
    }
    let needed = u16::from_le_bytes([bytes[10], bytes[11]]);
    if needed > VERSION {
        return Err(StoreError::TooNew {
            path: path.to_owned(),
            needed,
            known: VERSION,
        });
    }
    let (content, hash) = bytes.split_at(bytes.len() - HASH_BYTES);
    if ChunkId::of(content).0 != hash {
        return Err(StoreError::damaged(path, "its hash does not match"));
    }
    let seal: Sealed = rmp_serde::from_slice(&content[HEADER_BYTES..])
        .map_err(|error| StoreError::damaged(path, error.to_string()))?;
    if seal.part != *part {
        return Err(StoreError::foreign(path, format!("it seals {}", seal.part)));
    }
    Ok(Some(seal))
}
