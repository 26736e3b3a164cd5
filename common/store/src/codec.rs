//! A chunk as packs hold it and as the wire carries it: codec, lengths and encoded bytes.

use crcoord_common::image::ChunkId;

use crate::error::StoreError;

/// Longest uncompressed chunk that is accepted, in bytes. A chunk of pages has at most 64 KiB, a
/// node of the page index about 21 KiB; the rest is room for later formats.
pub const RAW_LIMIT: u32 = 1 << 20;

/// How a chunk's bytes are stored. The numbers never change; 2 is reserved for zstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One LZ4 block without a length prefix.
    Lz4 = 1,
}

impl Codec {
    /// The codec of this number, if this version knows it.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Lz4),
            _ => None,
        }
    }
}

/// A chunk in its stored form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedChunk {
    /// Hash of the uncompressed bytes.
    pub id: ChunkId,
    /// How `bytes` are encoded.
    pub codec: Codec,
    /// Length of the uncompressed bytes: 1 to [`RAW_LIMIT`].
    pub raw_length: u32,
    /// The encoded bytes, never more than `raw_length`.
    pub bytes: Vec<u8>,
}

impl EncodedChunk {
    /// Hashes and compresses. Pure and slow: call it from many threads, outside of any lock.
    pub fn encode(raw: &[u8]) -> Result<Self, StoreError> {
        Self::encode_as(ChunkId::of(raw), raw)
    }

    /// Compresses bytes whose hash the caller has computed already.
    pub fn encode_as(id: ChunkId, raw: &[u8]) -> Result<Self, StoreError> {
        let raw_length = u32::try_from(raw.len())
            .ok()
            .filter(|length| (1..=RAW_LIMIT).contains(length))
            .ok_or_else(|| refused(id, format!("{} bytes is no chunk length", raw.len())))?;
        let compressed = lz4_flex::block::compress(raw);
        // Below one sixteenth the gain does not pay for decompressing at restart.
        let (codec, bytes) = if compressed.len() < raw.len() - raw.len() / 16 {
            (Codec::Lz4, compressed)
        } else {
            (Codec::Raw, raw.to_vec())
        };
        Ok(EncodedChunk {
            id,
            codec,
            raw_length,
            bytes,
        })
    }

    /// Takes a chunk that another store encoded; refuses it unless it decodes to what its id names.
    pub fn verified(
        id: ChunkId,
        codec: u8,
        raw_length: u32,
        bytes: Vec<u8>,
    ) -> Result<Self, StoreError> {
        let codec = Codec::from_byte(codec)
            .ok_or_else(|| refused(id, format!("codec {codec} is not known")))?;
        lengths_are_possible(codec, bytes.len() as u64, raw_length)
            .map_err(|what| refused(id, what.to_owned()))?;
        let chunk = EncodedChunk {
            id,
            codec,
            raw_length,
            bytes,
        };
        chunk.decode_verified()?;
        Ok(chunk)
    }

    /// Decompresses without looking at the hash.
    pub fn decode(&self) -> Result<Vec<u8>, StoreError> {
        match self.codec {
            Codec::Raw => Ok(self.bytes.clone()),
            Codec::Lz4 => {
                let raw = lz4_flex::block::decompress(&self.bytes, self.raw_length as usize)
                    .map_err(|error| {
                        refused(self.id, format!("it does not decompress: {error}"))
                    })?;
                if raw.len() != self.raw_length as usize {
                    return Err(refused(self.id, "it decompresses to another length".into()));
                }
                Ok(raw)
            }
        }
    }

    /// Decompresses and checks the hash.
    pub fn decode_verified(&self) -> Result<Vec<u8>, StoreError> {
        let raw = self.decode()?;
        if ChunkId::of(&raw) != self.id {
            return Err(refused(self.id, "its content does not match its id".into()));
        }
        Ok(raw)
    }
}

/// Checks what must hold between a chunk's lengths before anything is allocated for it.
pub(crate) fn lengths_are_possible(
    codec: Codec,
    stored: u64,
    raw_length: u32,
) -> Result<(), &'static str> {
    let possible = match codec {
        Codec::Raw => stored == u64::from(raw_length),
        Codec::Lz4 => stored > 0 && stored < u64::from(raw_length),
    };
    if (1..=RAW_LIMIT).contains(&raw_length) && possible {
        Ok(())
    } else {
        Err("its lengths are out of range")
    }
}

fn refused(chunk: ChunkId, what: String) -> StoreError {
    StoreError::BadChunk { chunk, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_choice_of_codec() {
        let flat = vec![7u8; 65536];
        let chunk = EncodedChunk::encode(&flat).unwrap();
        assert_eq!(chunk.codec, Codec::Lz4);
        assert_eq!(chunk.decode_verified().unwrap(), flat);
        let mut noise = Vec::new();
        for block in 0u64..2048 {
            noise.extend_from_slice(&ChunkId::of(&block.to_le_bytes()).0);
        }
        let chunk = EncodedChunk::encode(&noise).unwrap();
        assert_eq!((chunk.codec, &chunk.bytes), (Codec::Raw, &noise));
        assert_eq!(EncodedChunk::encode(&[1]).unwrap().codec, Codec::Raw);
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(EncodedChunk::encode(&[]).is_err());
        assert!(EncodedChunk::encode(&vec![0; RAW_LIMIT as usize + 1]).is_err());
        let chunk = EncodedChunk::encode(&[0; 4096]).unwrap();
        let take =
            |codec, raw, bytes: &[u8]| EncodedChunk::verified(chunk.id, codec, raw, bytes.to_vec());
        assert_eq!(take(1, 4096, &chunk.bytes).unwrap(), chunk);
        assert!(take(0, 4096, &chunk.bytes).is_err());
        assert!(take(2, 4096, &chunk.bytes).is_err());
        assert!(take(1, 4095, &chunk.bytes).is_err());
        assert!(take(1, u32::MAX, &chunk.bytes).is_err());
        assert!(take(0, 4096, &[1; 4096]).is_err());
        assert!(take(0, 0, &[]).is_err());
    }
}
