//! Chunks: the unit in which memory is hashed, stored and sent.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::ObjectId;

/// Bytes of address space that one chunk stands for. A chunk holds the pages present in one
/// aligned window of this size and nothing else, so it is never larger.
pub const WINDOW_BYTES: u64 = 64 << 10;

/// The BLAKE3 hash of a chunk's uncompressed bytes: its name everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// The id of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}

impl Serialize for ChunkId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for ChunkId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = serde_bytes::ByteArray::<32>::deserialize(deserializer)?;
        Ok(Self(bytes.into_array()))
    }
}

/// Which pages of which window a chunk's bytes are: page after page in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRun {
    /// The memory object. A process's private memory is addressed by virtual address, a shared
    /// object's by offset.
    pub object: ObjectId,
    /// Address or offset divided by [`WINDOW_BYTES`].
    pub window: u64,
    /// Bit *n* set: page *n* of the window is in the chunk. With 4 KiB pages all 16 bits are used.
    pub present: u16,
}

impl PageRun {
    /// Address or offset of the window's first byte.
    pub fn start(&self) -> u64 {
        self.window * WINDOW_BYTES
    }

    /// How many bytes the chunk has.
    pub fn bytes(&self, page_size: u64) -> u64 {
        u64::from(self.present.count_ones()) * page_size
    }

    /// The contiguous pieces: (address or offset, position in the chunk, length), ascending.
    pub fn pieces(&self, page_size: u64) -> impl Iterator<Item = (u64, usize, usize)> + use<> {
        let (start, present) = (self.start(), self.present);
        let mut bit = 0u32;
        let mut position = 0usize;
        std::iter::from_fn(move || {
            while bit < 16 && present & (1 << bit) == 0 {
                bit += 1;
            }
            if bit >= 16 {
                return None;
            }
            let first = bit;
            while bit < 16 && present & (1 << bit) != 0 {
                bit += 1;
            }
            let length = (bit - first) as usize * page_size as usize;
            let piece = (start + u64::from(first) * page_size, position, length);
            position += length;
            Some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_contiguous_pages() {
        let run = PageRun {
            object: ObjectId(1),
            window: 2,
            present: 0b1000_0000_0000_1101,
        };
        let base = 2 * WINDOW_BYTES;
        let pieces: Vec<_> = run.pieces(4096).collect();
        assert_eq!(
            pieces,
            [
                (base, 0, 4096),
                (base + 8192, 4096, 8192),
                (base + 15 * 4096, 12288, 4096)
            ]
        );
        assert_eq!(run.bytes(4096), 16384);
    }
}
