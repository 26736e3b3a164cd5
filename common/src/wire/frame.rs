//! Framing over blocking streams: a length (u32, little endian), then a named MessagePack map.

use std::io::{Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A frame that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] std::io::Error),
    /// The other side announced more than is allowed.
    #[error("a message of {length} bytes was announced, at most {limit} are allowed")]
    TooLarge {
        /// Announced length.
        length: u64,
        /// The limit.
        limit: u32,
    },
    /// The message does not decode.
    #[error("a message does not decode: {0}")]
    Undecodable(String),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a message")]
    Truncated,
}

/// Encodes one message with its length in front.
pub fn encode<T: Serialize>(message: &T, limit: u32) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message)
        .map_err(|error| FrameError::Undecodable(error.to_string()))?;
    let length = (bytes.len() - 4) as u64;
    if length > u64::from(limit) {
        return Err(FrameError::TooLarge { length, limit });
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Decodes the body of one frame.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    rmp_serde::from_slice(body).map_err(|error| FrameError::Undecodable(error.to_string()))
}

/// Writes one message.
pub fn write<T: Serialize>(
    stream: &mut impl Write,
    message: &T,
    limit: u32,
) -> Result<(), FrameError> {
    stream.write_all(&encode(message, limit)?)?;
    Ok(())
}

/// Reads one message; `None` when the stream ended cleanly before it.
pub fn read<T: DeserializeOwned>(
    stream: &mut impl Read,
    limit: u32,
) -> Result<Option<T>, FrameError> {
    let mut length = [0; 4];
    let mut have = 0;
    while have < length.len() {
        match stream.read(&mut length[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(count) => have += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(length);
    if length > limit {
        return Err(FrameError::TooLarge {
            length: length.into(),
            limit,
        });
    }
    let mut body = vec![0; length as usize];
    stream
        .read_exact(&mut body)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => FrameError::Truncated,
            _ => FrameError::Io(error),
        })?;
    decode(&body).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut bytes = Vec::new();
        write(&mut bytes, &("a", 1u8), 100).unwrap();
        write(&mut bytes, &("b", 2u8), 100).unwrap();
        let mut stream = &bytes[..];
        assert_eq!(
            read::<(String, u8)>(&mut stream, 100).unwrap(),
            Some(("a".into(), 1))
        );
        assert_eq!(
            read::<(String, u8)>(&mut stream, 100).unwrap(),
            Some(("b".into(), 2))
        );
        assert_eq!(read::<(String, u8)>(&mut stream, 100).unwrap(), None);
        let mut cut = &bytes[..bytes.len() - 1];
        read::<(String, u8)>(&mut cut, 100).unwrap();
        assert!(matches!(
            read::<(String, u8)>(&mut cut, 100),
            Err(FrameError::Truncated)
        ));
    }

    #[test]
    fn a_huge_length_is_refused_before_allocation() {
        let mut stream = &[0xff, 0xff, 0xff, 0xff][..];
        assert!(matches!(
            read::<u8>(&mut stream, 100),
            Err(FrameError::TooLarge { .. })
        ));
    }
}
