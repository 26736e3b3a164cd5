//! Frames over any asynchronous byte stream, and the control streams of a connection.
//!
//! `FrameReader` and `FrameWriter` serve QUIC streams and the daemons' unix sockets alike.

use crcoord_common::wire::MESSAGE_LIMIT;
use crcoord_common::wire::frame::{self, FrameError, HEADER_BYTES};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::halves::{RecvHalf, SendHalf};

/// Room made for a read when no frame has begun: several small messages per call, without taking
/// much of a following body through the buffer.
const READ_AHEAD: usize = 8 << 10;

/// The buffer grows by at most this much ahead of what has arrived: an announced length alone never
/// makes us allocate more.
const GROWTH: usize = 256 << 10;

/// A buffer that a large frame made bigger than this is given back once empty.
const KEPT_BUFFER: usize = 256 << 10;

/// Reads frames. A `recv` that is dropped half-way (a lost branch of `select!`) loses nothing: what
/// has arrived stays in the reader.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    /// Bytes that arrived; those before `start` have been handed out.
    buffer: Vec<u8>,
    start: usize,
    frame_limit: u32,
    out_of_step: bool,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader with the default limit of 16 MiB a frame.
    pub fn new(stream: R) -> Self {
        Self::with_limit(stream, MESSAGE_LIMIT)
    }

    /// A reader that refuses frames with bodies beyond `frame_limit` bytes.
    pub fn with_limit(stream: R, frame_limit: u32) -> Self {
        FrameReader {
            stream,
            buffer: Vec::new(),
            start: 0,
            frame_limit,
            out_of_step: false,
        }
    }

    /// The next message; `None` when the stream ended cleanly between two frames. Cancel-safe.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        if self.out_of_step {
            return Err(FrameError::OutOfStep);
        }
        let result = self.recv_in_step().await;
        // After a refused frame the next length would be read from the middle of something.
        self.out_of_step = result.is_err();
        result
    }

    /// Reads exactly `length` raw bytes into `body` (which is cleared first). `limit` bounds the
    /// length before anything is allocated. Not cancel-safe: a reader whose `recv_body` was dropped
    /// half-way refuses further use instead of misreading.
    pub async fn recv_body(
        &mut self,
        length: usize,
        limit: u32,
        body: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        body.clear();
        if std::mem::replace(&mut self.out_of_step, true) {
            return Err(FrameError::OutOfStep);
        }
        if length > limit as usize {
            return Err(FrameError::TooLarge {
                length: length as u64,
                limit,
            });
        }
        body.reserve(length);
        let buffered = &self.buffer[self.start..];
        let buffered = &buffered[..length.min(buffered.len())];
        body.extend_from_slice(buffered);
        self.start += buffered.len();
        while body.len() < length {
            let missing = (length - body.len()) as u64;
            if (&mut self.stream).take(missing).read_buf(body).await? == 0 {
                return Err(FrameError::Truncated);
            }
        }
        self.out_of_step = false;
        Ok(())
    }

    /// The stream below, for its address or credentials; reading from it would steal frames.
    pub fn get_ref(&self) -> &R {
        &self.stream
    }

    async fn recv_in_step<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        loop {
            let pending = &self.buffer[self.start..];
            let missing = match frame::body_length(pending, self.frame_limit)? {
                Some(length) if pending.len() >= HEADER_BYTES + length => {
                    let message = frame::decode(&pending[HEADER_BYTES..HEADER_BYTES + length])?;
                    self.start += HEADER_BYTES + length;
                    self.recycle();
                    return Ok(Some(message));
                }
                Some(length) => HEADER_BYTES + length - pending.len(),
                None => READ_AHEAD,
            };
            let got = pending.len();
            if self.start > 0 {
                self.buffer.drain(..self.start);
                self.start = 0;
            }
            self.buffer.reserve(missing.clamp(READ_AHEAD, GROWTH));
            // tokio documents `read_buf` as cancel-safe: either bytes are in the buffer or none
            // were taken from the stream.
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return match got {
                    0 => Ok(None),
                    _ => Err(FrameError::Truncated),
                };
            }
        }
    }

    fn recycle(&mut self) {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            if self.buffer.capacity() > KEPT_BUFFER {
                self.buffer = Vec::new();
            }
        }
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    /// Encoded bytes; those before `written` are with the stream.
    buffer: Vec<u8>,
    written: usize,
    frame_limit: u32,
    out_of_step: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// A writer with the default limit of 16 MiB a frame.
    pub fn new(stream: W) -> Self {
        Self::with_limit(stream, MESSAGE_LIMIT)
    }

    /// A writer that refuses messages with bodies beyond `frame_limit` bytes.
    pub fn with_limit(stream: W, frame_limit: u32) -> Self {
        FrameWriter {
            stream,
            buffer: Vec::new(),
            written: 0,
            frame_limit,
            out_of_step: false,
        }
    }

    /// Sends one message. If the call is dropped half-way the message is either not sent at all or
    /// its rest goes out with the next call: the stream never gets out of step.
    pub async fn send<T>(&mut self, message: &T) -> Result<(), FrameError>
    where
        T: Serialize + ?Sized,
    {
        if self.out_of_step {
            return Err(FrameError::OutOfStep);
        }
        self.flush().await?;
        frame::append(message, self.frame_limit, &mut self.buffer)?;
        self.flush().await
    }

    /// Sends raw bytes whose length the peer knows from the message before. Not cancel-safe: a
    /// writer whose `send_body` was dropped half-way refuses further use.
    pub async fn send_body(&mut self, body: &[u8]) -> Result<(), FrameError> {
        self.begin_body().await?.write_all(body).await?;
        self.end_body();
        Ok(())
    }

    /// Sends what a dropped `send` left over, and ends the stream.
    pub async fn finish(&mut self) -> Result<(), FrameError> {
        if self.out_of_step {
            return Err(FrameError::OutOfStep);
        }
        self.flush().await?;
        self.stream.shutdown().await?;
        Ok(())
    }

    /// The stream below; for `send_body` in other forms, between `begin_body` and `end_body`.
    pub(crate) async fn begin_body(&mut self) -> Result<&mut W, FrameError> {
        if self.out_of_step {
            return Err(FrameError::OutOfStep);
        }
        self.flush().await?;
        self.out_of_step = true;
        Ok(&mut self.stream)
    }

    pub(crate) fn end_body(&mut self) {
        self.out_of_step = false;
    }

    pub(crate) fn into_stream(self) -> W {
        self.stream
    }

    async fn flush(&mut self) -> Result<(), FrameError> {
        while self.written < self.buffer.len() {
            let count = self.stream.write(&self.buffer[self.written..]).await?;
            if count == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into());
            }
            self.written += count;
        }
        self.written = 0;
        self.buffer.clear();
        if self.buffer.capacity() > KEPT_BUFFER {
            self.buffer = Vec::new();
        }
        self.stream.flush().await?;
        Ok(())
    }
}

/// A stream of messages in both directions. Sent before bulk data where both wait.
#[derive(Debug)]
pub struct ControlStream {
    /// Our messages to the peer.
    pub sender: Sender,
    /// The peer's messages to us.
    pub receiver: Receiver,
}

impl ControlStream {
    pub(crate) fn new(send: SendHalf, recv: RecvHalf, frame_limit: u32) -> Self {
        ControlStream {
            sender: Sender(FrameWriter::with_limit(send, frame_limit)),
            receiver: Receiver(FrameReader::with_limit(recv, frame_limit)),
        }
    }

    /// Both halves, to be used by two tasks.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

/// The sending half of a control stream. Dropped without `finish`, the peer sees the stream reset,
/// not its clean end, and messages still under way may be lost.
#[derive(Debug)]
pub struct Sender(FrameWriter<SendHalf>);

impl Sender {
    /// Sends one message; see [`FrameWriter::send`] on cancelling.
    pub async fn send<T>(&mut self, message: &T) -> Result<(), FrameError>
    where
        T: Serialize + ?Sized,
    {
        self.0.send(message).await
    }

    /// Ends the stream and waits until the peer's transport has all of it.
    pub async fn finish(mut self) -> Result<(), FrameError> {
        self.0.finish().await?;
        self.0.into_stream().delivered().await?;
        Ok(())
    }
}

/// The receiving half of a control stream.
#[derive(Debug)]
pub struct Receiver(FrameReader<RecvHalf>);

impl Receiver {
    /// The next message; `None` at the peer's clean end. Cancel-safe.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        self.0.recv().await
    }
}
