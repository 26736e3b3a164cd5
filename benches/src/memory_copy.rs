//! memcpy, the yardstick: what this machine can do at this moment with nothing but copying.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes of each side: far more than any cache of the machines in question, and small beside the
/// memory of what is captured.
const BUFFER: usize = 256 << 20;

/// Two buffers, all pages present.
#[derive(Debug)]
pub struct MemoryCopy {
    source: Vec<u8>,
    /// Where copies go; sinks of captures may use it too.
    pub destination: Vec<u8>,
}

impl Default for MemoryCopy {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryCopy {
    /// Allocates and touches both buffers.
    pub fn new() -> Self {
        MemoryCopy {
            source: vec![1; BUFFER],
            destination: vec![2; BUFFER],
        }
    }

    /// Copies this many bytes, from the start again where the buffers end.
    pub fn run(&mut self, bytes: u64) -> Duration {
        let start = Instant::now();
        let mut left = bytes;
        while left > 0 {
            let part = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
            self.destination[..part].copy_from_slice(black_box(&self.source[..part]));
            black_box(&mut self.destination);
            left -= part as u64;
        }
        start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_copied() {
        let mut copy = MemoryCopy::new();
        assert!(!copy.run(BUFFER as u64 + 4096).is_zero());
        assert!(copy.destination.iter().all(|byte| *byte == 1));
    }
}
