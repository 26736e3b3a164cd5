//! Deterministic data: every byte is a function of a seed and its position.

/// One 64-bit word of the stream `seed` (the finaliser of SplitMix64).
pub fn word(seed: u64, index: u64) -> u64 {
    let mut value = seed ^ index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Bytes `start..start + length` of the stream `seed`.
pub fn bytes(seed: u64, start: u64, length: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(length + 16);
    let skip = (start % 8) as usize;
    let mut index = start / 8;
    while data.len() < length + skip {
        data.extend_from_slice(&word(seed, index).to_le_bytes());
        index += 1;
    }
    data.drain(..skip);
    data.truncate(length);
    data
}

/// The position of the first difference, for a message.
pub fn first_difference(found: &[u8], expected: &[u8]) -> Option<usize> {
    if found == expected {
        return None;
    }
    let common = found
        .iter()
        .zip(expected)
        .position(|(left, right)| left != right);
    Some(common.unwrap_or(found.len().min(expected.len())))
}

/// FNV-1a, 64 bits, continued from `state` (start with [`FNV_START`]).
pub fn fnv1a(state: u64, data: &[u8]) -> u64 {
    data.iter().fold(state, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The offset basis of FNV-1a with 64 bits.
pub const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_a_stream_agree() {
        let whole = bytes(7, 0, 100);
        assert_eq!(&whole[13..60], &bytes(7, 13, 47)[..]);
        assert_ne!(whole, bytes(8, 0, 100));
        assert_eq!(first_difference(b"abc", b"abd"), Some(2));
        assert_eq!(first_difference(b"ab", b"abd"), Some(2));
        assert_eq!(fnv1a(FNV_START, b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
