//! What a chunk costs: its hash, its compression, and both ways together, on one thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crcoord_common::image::{ChunkId, WINDOW_BYTES};
use crcoord_store::EncodedChunk;

use crate::failure::{Explain, Result};
use crate::figures::{Collection, Sample, size_label};
use crate::memory_copy::MemoryCopy;

/// Bytes of different content that are gone through again and again.
const CONTENT: usize = 64 << 20;
const WINDOW: usize = WINDOW_BYTES as usize;

/// Measures hashing, encoding and decoding of this many bytes.
pub fn measure(bytes: u64, rounds: u32, collection: &mut Collection) -> Result<()> {
    let bytes = bytes.max(WINDOW_BYTES) / WINDOW_BYTES * WINDOW_BYTES;
    let mut copy = MemoryCopy::new();
    copy.run(bytes);
    for content in [random(), smooth_field()] {
        let subject = format!("{} {}", size_label(bytes), content.name);
        let windows = || content.bytes.chunks_exact(WINDOW).cycle();
        let count = (bytes / WINDOW_BYTES) as usize;
        for _ in 0..rounds {
            let yardstick = copy.run(bytes);
            let mut add = |what, took| {
                let sample = Sample {
                    took,
                    yardstick,
                    frozen: None,
                };
                collection.add(&subject, what, bytes, "memcpy", sample);
            };
            let start = Instant::now();
            for window in windows().take(count) {
                black_box(ChunkId::of(black_box(window)));
            }
            add("blake3", start.elapsed());
            let (mut encoding, mut decoding) = (Duration::ZERO, Duration::ZERO);
            for window in windows().take(count) {
                let start = Instant::now();
                let chunk = EncodedChunk::encode(black_box(window)).explain("encoding")?;
                let between = Instant::now();
                black_box(chunk.decode_verified().explain("decoding")?);
                encoding += between - start;
                decoding += between.elapsed();
            }
            add("blake3 + lz4, encode", encoding);
            add("lz4 + blake3, decode and verify", decoding);
        }
    }
    Ok(())
}

struct Content {
    name: &'static str,
    bytes: Vec<u8>,
}

/// What no compressor makes smaller: such chunks are stored as they are.
fn random() -> Content {
    let blocks = 0..(CONTENT / 32) as u64;
    Content {
        name: "random",
        bytes: blocks
            .flat_map(|block| ChunkId::of(&block.to_le_bytes()).0)
            .collect(),
    }
}

/// Doubles of a field with few different values near each other, as solvers of equations have them.
fn smooth_field() -> Content {
    let values = 0..CONTENT / 8;
    let value = |at: usize| ((at / 64 % 1024) as f64 * 0.001).sin();
    Content {
        name: "smooth doubles",
        bytes: values.flat_map(|at| value(at).to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use crcoord_store::Codec;

    use super::*;

    #[test]
    fn contents_are_what_they_are_called() {
        let codec = |content: Content| {
            EncodedChunk::encode(&content.bytes[..WINDOW])
                .unwrap()
                .codec
        };
        assert_eq!(codec(random()), Codec::Raw);
        assert_eq!(codec(smooth_field()), Codec::Lz4);
    }
}
