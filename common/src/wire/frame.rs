//! Framing: a length (`u32`, little endian, of the body alone), then a body: one named MessagePack
//! map, so that either side may add a field. The same on QUIC streams, unix sockets and the engine's
//! socketpair; see WIRE.md. Here are the pure parts and the blocking reader and writer.

use std::io::{self, Cursor, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::report::{Class, Report};

/// Bytes of the length before each body.
pub const HEADER_BYTES: usize = 4;

/// Deepest nesting of maps and arrays in a body. The decoder recurses on a thread's stack; our
/// deepest message nests less than 20.
const DEPTH_LIMIT: usize = 96;

/// Room made for a body before any of it has arrived, in bytes: an announced length alone does not
/// make us allocate more.
const FIRST_ROOM: usize = 256 << 10;

/// A frame that could not be read or written. After a failed read the stream is out of step and must
/// be dropped.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The other side announced more than is allowed; nothing was allocated for it.
    #[error("a message of {length} bytes was announced, at most {limit} are allowed")]
    TooLarge {
        /// Announced length.
        length: u64,
        /// The limit.
        limit: u32,
    },
    /// Our own message or body is larger than is allowed; nothing was sent.
    #[error("a message of {length} bytes was not sent, at most {limit} are allowed")]
    TooLargeToSend {
        /// Its length.
        length: u64,
        /// The limit.
        limit: u32,
    },
    /// The message does not decode.
    #[error("a message does not decode: {0}")]
    Undecodable(String),
    /// Our own message does not encode; nothing was sent.
    #[error("a message does not encode: {0}")]
    Unencodable(String),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a message")]
    Truncated,
    /// An earlier transfer was cancelled half-way or refused, so the stream cannot be used further.
    #[error("an earlier transfer on this stream was cancelled or refused half-way")]
    OutOfStep,
}

impl FrameError {
    /// As it crosses the wire and reaches people; the caller adds where.
    pub fn report(&self) -> Report {
        let (code, class) = match self {
            FrameError::Io(_) => ("frame-io", Class::Unreachable),
            FrameError::TooLarge { .. } => ("frame-too-large", Class::Failure),
            FrameError::TooLargeToSend { .. } => ("frame-too-large-to-send", Class::Failure),
            FrameError::Undecodable(_) => ("frame-undecodable", Class::Failure),
            FrameError::Unencodable(_) => ("frame-unencodable", Class::Failure),
            FrameError::Truncated => ("frame-truncated", Class::Unreachable),
            FrameError::OutOfStep => ("frame-out-of-step", Class::Failure),
        };
        let report = Report::new(code, class, self.to_string());
        match self {
            FrameError::Io(error) => report
                .errno(error.raw_os_error())
                .remedy("look into the log of the other side, which ended or was cut off"),
            FrameError::Truncated => {
                report.remedy("look into the log of the other side, which ended or was cut off")
            }
            FrameError::Undecodable(_) => report.remedy("run the same version on both sides"),
            _ => report,
        }
    }
}

/// Encodes one message with its length in front.
pub fn encode<T: Serialize + ?Sized>(message: &T, limit: u32) -> Result<Vec<u8>, FrameError> {
    let mut bytes = Vec::new();
    append(message, limit, &mut bytes)?;
    Ok(bytes)
}

/// Appends one message with its length in front to `bytes`, which an error leaves as it was.
pub fn append<T: Serialize + ?Sized>(
    message: &T,
    limit: u32,
    bytes: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let start = bytes.len();
    bytes.extend_from_slice(&[0; HEADER_BYTES]);
    let encoded = rmp_serde::encode::write_named(bytes, message);
    let length = bytes.len() - start - HEADER_BYTES;
    let result = match (encoded, u32::try_from(length)) {
        (Err(error), _) => Err(FrameError::Unencodable(error.to_string())),
        (Ok(()), Ok(field)) if field <= limit => {
            bytes[start..start + HEADER_BYTES].copy_from_slice(&field.to_le_bytes());
            Ok(())
        }
        (Ok(()), _) => Err(FrameError::TooLargeToSend {
            length: length as u64,
            limit,
        }),
    };
    if result.is_err() {
        bytes.truncate(start);
    }
    result
}

/// The length of the body that `bytes` announce; `None` while the length itself is incomplete.
pub fn body_length(bytes: &[u8], limit: u32) -> Result<Option<usize>, FrameError> {
    let Some(field) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*field);
    if length > limit {
        return Err(FrameError::TooLarge {
            length: length.into(),
            limit,
        });
    }
    Ok(Some(length as usize))
}

/// Decodes the body of one frame. Bytes left over are an error.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let failed = |reason: String| {
        FrameError::Undecodable(format!("{}: {reason}", std::any::type_name::<T>()))
    };
    // Not `from_slice`, which bounds the depth at 1024 only and does not see bytes left over.
    let mut decoder = rmp_serde::Deserializer::new(Cursor::new(body));
    decoder.set_max_depth(DEPTH_LIMIT);
    let message = T::deserialize(&mut decoder).map_err(|error| failed(error.to_string()))?;
    match body.len() as u64 - decoder.position() {
        0 => Ok(message),
        rest => Err(failed(format!("{rest} bytes left over"))),
    }
}

/// Writes one message and flushes.
pub fn write<T: Serialize + ?Sized>(
    stream: &mut impl Write,
    message: &T,
    limit: u32,
) -> Result<(), FrameError> {
    stream.write_all(&encode(message, limit)?)?;
    stream.flush()?;
    Ok(())
}

/// Reads one message; `None` when the stream ended cleanly before it. No byte beyond the message is
/// read.
pub fn read<T: DeserializeOwned>(
    stream: &mut impl Read,
    limit: u32,
) -> Result<Option<T>, FrameError> {
    let mut field = [0; HEADER_BYTES];
    let mut have = 0;
    while have < field.len() {
        match stream.read(&mut field[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = body_length(&field, limit)?.ok_or(FrameError::Truncated)?;
    let mut body = Vec::with_capacity(length.min(FIRST_ROOM));
    stream.take(length as u64).read_to_end(&mut body)?;
    match body.len() == length {
        true => decode(&body).map(Some),
        false => Err(FrameError::Truncated),
    }
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

    #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Ping {
        number: u64,
        text: String,
    }

    fn ping() -> Ping {
        Ping {
            number: 7,
            text: "here".into(),
        }
    }

    #[test]
    fn the_bytes_are_a_little_endian_length_and_a_named_map() {
        assert_eq!(
            encode(&ping(), 100).unwrap(),
            b"\x13\x00\x00\x00\x82\xa6number\x07\xa4text\xa4here"
        );
    }

    #[test]
    fn every_cut_inside_a_frame_is_told_from_a_clean_end() {
        let frame = encode(&ping(), 100).unwrap();
        for cut in 1..frame.len() {
            let error = read::<Ping>(&mut &frame[..cut], 100).unwrap_err();
            assert!(
                matches!(error, FrameError::Truncated),
                "cut at {cut}: {error}"
            );
        }
    }

    #[test]
    fn a_message_beyond_the_limit_leaves_the_buffer_as_it_was() {
        let mut bytes = b"before".to_vec();
        assert!(matches!(
            append(&ping(), 18, &mut bytes),
            Err(FrameError::TooLargeToSend {
                length: 19,
                limit: 18
            })
        ));
        assert_eq!(bytes, b"before");
    }

    #[test]
    fn leftovers_and_deep_nesting_are_refused() {
        let mut body = rmp_serde::to_vec_named(&ping()).unwrap();
        assert_eq!(decode::<Ping>(&body).unwrap(), ping());
        body.push(0xc0);
        let error = decode::<Ping>(&body).unwrap_err();
        assert!(error.to_string().contains("1 bytes left over"), "{error}");

        #[derive(Debug, serde::Deserialize)]
        struct Nested(#[allow(dead_code)] Vec<Nested>);
        let mut deep = vec![0x91; 100_000];
        deep.push(0x90);
        assert!(decode::<Nested>(&deep).is_err());
    }
}
