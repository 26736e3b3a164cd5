//! Frames: how one message lies in a byte stream, and the blocking reader and writer of them.
//!
//! A frame is a length (`u32`, little-endian, of the body alone) and a body: one `rmp-serde` value
//! with structs as *named* maps, so that either side may add a field. The layout is the same on
//! QUIC streams, unix sockets and the engine's socketpair; see WIRE.md, "Framing".

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::report::{Class, Report};
use crate::wire::MESSAGE_LIMIT;

/// Bytes of the length before each body.
pub const FRAME_HEADER: usize = 4;

/// Largest body accepted unless a caller says otherwise, in bytes (16 MiB).
pub const DEFAULT_FRAME_LIMIT: usize = MESSAGE_LIMIT as usize;

/// Deepest nesting of maps and arrays a body may have. The decoder recurses, and a daemon's thread
/// has 2 MiB of stack; our deepest message nests less than 20.
const DEPTH_LIMIT: usize = 96;

/// A body grows by at most this many bytes ahead of what has arrived: an announced length alone
/// never makes the receiver allocate more.
const GROWTH: usize = 256 << 10;

/// Why a frame could not be sent or received. After any of these but `Encode` and `TooLargeToSend`
/// the stream is out of step and must be dropped.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream below failed.
    #[error("stream failed: {0}")]
    Io(#[from] io::Error),
    /// The peer announced a body beyond the limit; nothing was allocated for it.
    #[error("peer announced a frame of {length} bytes, the limit is {limit}")]
    TooLarge {
        /// The announced length in bytes.
        length: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// Our own message is beyond the limit; nothing was sent.
    #[error("message of {length} bytes not sent, the limit is {limit}")]
    TooLargeToSend {
        /// The message's length in bytes.
        length: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The stream ended inside a frame or body.
    #[error("stream ended after {got} of {expected} bytes of a frame")]
    Truncated {
        /// Bytes that arrived, the length field included.
        got: u64,
        /// Bytes expected, as far as known.
        expected: u64,
    },
    /// The body is not the message that was expected here.
    #[error("frame does not hold a {expected}: {reason}")]
    Decode {
        /// The Rust type that was expected.
        expected: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// A message could not be encoded; nothing was sent.
    #[error("{message} cannot be encoded: {reason}")]
    Encode {
        /// The Rust type of the message.
        message: &'static str,
        /// The encoder's words.
        reason: String,
    },
    /// An earlier body was cut short on our side, so the stream is out of step.
    #[error("an earlier transfer on this stream was cancelled half-way")]
    OutOfStep,
}

impl FrameError {
    /// As it crosses the wire and reaches people; the caller adds where.
    pub fn report(&self) -> Report {
        let (code, class) = match self {
            FrameError::Io(_) => ("frame-io", Class::Unreachable),
            FrameError::TooLarge { .. } => ("frame-too-large", Class::Failure),
            FrameError::TooLargeToSend { .. } => ("frame-too-large-to-send", Class::Failure),
            FrameError::Truncated { .. } => ("frame-truncated", Class::Unreachable),
            FrameError::Decode { .. } => ("frame-decode", Class::Failure),
            FrameError::Encode { .. } => ("frame-encode", Class::Failure),
            FrameError::OutOfStep => ("frame-out-of-step", Class::Failure),
        };
        let errno = match self {
            FrameError::Io(error) => error.raw_os_error(),
            _ => None,
        };
        let report = Report::new(code, class, self.to_string()).errno(errno);
        match self {
            FrameError::Decode { .. } => report.remedy("run the same version on both sides"),
            FrameError::Io(_) | FrameError::Truncated { .. } => {
                report.remedy("look into the log of the other side, which ended or was cut off")
            }
            _ => report,
        }
    }
}

/// Appends `message` as one frame to `out`. On error `out` is as it was.
pub fn encode_frame<T>(message: &T, limit: usize, out: &mut Vec<u8>) -> Result<(), FrameError>
where
    T: Serialize + ?Sized,
{
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER]);
    let result = append_body(message, limit, start, out);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn append_body<T>(
    message: &T,
    limit: usize,
    start: usize,
    out: &mut Vec<u8>,
) -> Result<(), FrameError>
where
    T: Serialize + ?Sized,
{
    rmp_serde::encode::write_named(out, message).map_err(|error| FrameError::Encode {
        message: short_type_name::<T>(),
        reason: error.to_string(),
    })?;
    let length = out.len() - start - FRAME_HEADER;
    let field = u32::try_from(length).ok().filter(|_| length <= limit);
    let Some(field) = field else {
        return Err(FrameError::TooLargeToSend {
            length: length as u64,
            limit: limit as u64,
        });
    };
    out[start..start + FRAME_HEADER].copy_from_slice(&field.to_le_bytes());
    Ok(())
}

/// The length of the body that `bytes` begins with, or `None` while its length field is incomplete.
pub fn frame_length(bytes: &[u8], limit: usize) -> Result<Option<usize>, FrameError> {
    let Some(field) = bytes.first_chunk::<FRAME_HEADER>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*field) as usize;
    if length > limit {
        return Err(FrameError::TooLarge {
            length: length as u64,
            limit: limit as u64,
        });
    }
    Ok(Some(length))
}

/// Decodes one whole body. Bytes left over after the value are an error.
pub fn decode_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let failed = |reason: String| FrameError::Decode {
        expected: short_type_name::<T>(),
        reason,
    };
    // Not `rmp_serde::from_slice`, which neither bounds the depth so tightly nor sees a remainder.
    let mut decoder = rmp_serde::Deserializer::new(io::Cursor::new(body));
    decoder.set_max_depth(DEPTH_LIMIT);
    let value = T::deserialize(&mut decoder).map_err(|error| failed(error.to_string()))?;
    let rest = body.len() as u64 - decoder.position();
    if rest != 0 {
        return Err(failed(format!("{rest} bytes left over")));
    }
    Ok(value)
}

/// Writes `message` as one frame and flushes; blocks.
pub fn write_frame<T>(writer: &mut impl Write, message: &T, limit: usize) -> Result<(), FrameError>
where
    T: Serialize + ?Sized,
{
    let mut frame = Vec::new();
    encode_frame(message, limit, &mut frame)?;
    writer.write_all(&frame)?;
    writer.flush()?;
    Ok(())
}

/// Reads one frame; blocks. `None` is the stream's end between two frames. It reads no byte beyond
/// the frame, so descriptors passed beside later bytes of a unix socket stay with those.
pub fn read_frame<T: DeserializeOwned>(
    reader: &mut impl Read,
    limit: usize,
) -> Result<Option<T>, FrameError> {
    let mut field = [0; FRAME_HEADER];
    let mut got = 0;
    while got < FRAME_HEADER {
        match reader.read(&mut field[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => {
                return Err(FrameError::Truncated {
                    got: got as u64,
                    expected: FRAME_HEADER as u64,
                });
            }
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = match frame_length(&field, limit)? {
        Some(length) => length,
        None => return Ok(None), // the field is complete
    };
    let mut body = Vec::with_capacity(length.min(GROWTH));
    reader.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(FrameError::Truncated {
            got: (FRAME_HEADER + body.len()) as u64,
            expected: (FRAME_HEADER + length) as u64,
        });
    }
    decode_body(&body).map(Some)
}

fn short_type_name<T: ?Sized>() -> &'static str {
    let name = std::any::type_name::<T>();
    match name.split_once('<') {
        Some(_) => name,
        None => name.rsplit("::").next().unwrap_or(name),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
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
        let mut frame = Vec::new();
        encode_frame(&ping(), DEFAULT_FRAME_LIMIT, &mut frame).unwrap();
        assert_eq!(frame, b"\x13\x00\x00\x00\x82\xa6number\x07\xa4text\xa4here");
    }

    #[test]
    fn frames_cross_a_socketpair_and_end_cleanly() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        write_frame(&mut ours, &ping(), 64).unwrap();
        write_frame(&mut ours, &ping(), 64).unwrap();
        drop(ours);
        assert_eq!(read_frame(&mut theirs, 64).unwrap(), Some(ping()));
        assert_eq!(read_frame(&mut theirs, 64).unwrap(), Some(ping()));
        assert_eq!(read_frame::<Ping>(&mut theirs, 64).unwrap(), None);
    }

    #[test]
    fn an_end_inside_a_frame_is_not_a_clean_end() {
        let mut frame = Vec::new();
        encode_frame(&ping(), 64, &mut frame).unwrap();
        for cut in 1..frame.len() {
            let error = read_frame::<Ping>(&mut &frame[..cut], 64).unwrap_err();
            assert!(
                matches!(error, FrameError::Truncated { got, .. } if got == cut as u64),
                "cut at {cut}: {error}"
            );
        }
    }

    #[test]
    fn an_oversize_length_is_refused_without_reading_on() {
        let mut bytes = &b"\xff\xff\xff\xffrest"[..];
        let error = read_frame::<Ping>(&mut bytes, 64).unwrap_err();
        assert!(matches!(
            error,
            FrameError::TooLarge {
                length: 0xffff_ffff,
                limit: 64
            }
        ));
        assert_eq!(bytes, b"rest");
    }

    #[test]
    fn a_message_beyond_the_limit_leaves_the_buffer_as_it_was() {
        let mut out = b"before".to_vec();
        let error = encode_frame(&ping(), 18, &mut out).unwrap_err();
        assert!(matches!(
            error,
            FrameError::TooLargeToSend {
                length: 19,
                limit: 18
            }
        ));
        assert_eq!(out, b"before");
    }

    #[test]
    fn leftovers_wrong_types_and_deep_nesting_are_refused() {
        let mut body = rmp_serde::to_vec_named(&ping()).unwrap();
        assert!(matches!(
            decode_body::<u64>(&body),
            Err(FrameError::Decode {
                expected: "u64",
                ..
            })
        ));
        body.push(0xc0);
        let error = decode_body::<Ping>(&body).unwrap_err();
        assert!(error.to_string().contains("1 bytes left over"), "{error}");

        #[derive(Debug, Deserialize)]
        struct Nested(#[allow(dead_code)] Vec<Nested>);
        let mut deep = vec![0x91; 100_000];
        deep.push(0x90);
        assert!(decode_body::<Nested>(&deep).is_err());
    }
}
