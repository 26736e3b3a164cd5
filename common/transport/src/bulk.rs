//! Bulk streams: messages and large raw bodies in both directions, begun by a typed header.

use bytes::Bytes;
use crcoord_common::wire::frame::FrameError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{FrameReader, FrameWriter};
use crate::halves::{RecvHalf, SendHalf};
use crate::limits::Limits;

/// A bulk stream. The opener has sent its header as the first message: the acceptor begins with
/// `receiver.recv::<Header>()`.
#[derive(Debug)]
pub struct BulkStream {
    /// What we send.
    pub sender: BulkSender,
    /// What the peer sends.
    pub receiver: BulkReceiver,
}

impl BulkStream {
    pub(crate) fn new(send: SendHalf, recv: RecvHalf, limits: &Limits) -> Self {
        BulkStream {
            sender: BulkSender {
                writer: FrameWriter::with_limit(send, limits.max_frame),
                body_limit: limits.max_body,
            },
            receiver: BulkReceiver {
                reader: FrameReader::with_limit(recv, limits.max_frame),
                body_limit: limits.max_body,
            },
        }
    }

    /// Both halves, to be used by two tasks.
    pub fn split(self) -> (BulkSender, BulkReceiver) {
        (self.sender, self.receiver)
    }
}

/// The sending half of a bulk stream. Dropped without `finish`, the peer sees the stream reset: half
/// of a transfer never looks like the whole.
#[derive(Debug)]
pub struct BulkSender {
    writer: FrameWriter<SendHalf>,
    body_limit: u32,
}

impl BulkSender {
    /// Sends one message; see [`FrameWriter::send`] on cancelling.
    pub async fn send<T>(&mut self, message: &T) -> Result<(), FrameError>
    where
        T: Serialize + ?Sized,
    {
        self.writer.send(message).await
    }

    /// Sends raw bytes. The message before must have told the peer their length.
    pub async fn send_body(&mut self, body: &[u8]) -> Result<(), FrameError> {
        self.check_body(body.len())?;
        self.writer.send_body(body).await
    }

    /// The same without a copy of the bytes.
    pub async fn send_body_bytes(&mut self, body: Bytes) -> Result<(), FrameError> {
        self.check_body(body.len())?;
        let half = self.writer.begin_body().await?;
        half.stream
            .write_chunk(body)
            .await
            .map_err(std::io::Error::from)?;
        self.writer.end_body();
        Ok(())
    }

    /// Ends the stream and waits until the peer's transport has all of it. That is not yet the
    /// peer's word that anything is durable: for that it has to answer.
    pub async fn finish(mut self) -> Result<(), FrameError> {
        self.writer.finish().await?;
        self.writer.into_stream().delivered().await?;
        Ok(())
    }

    fn check_body(&self, length: usize) -> Result<(), FrameError> {
        match length <= self.body_limit as usize {
            true => Ok(()),
            false => Err(FrameError::TooLargeToSend {
                length: length as u64,
                limit: self.body_limit,
            }),
        }
    }
}

/// The receiving half of a bulk stream.
#[derive(Debug)]
pub struct BulkReceiver {
    reader: FrameReader<RecvHalf>,
    body_limit: u32,
}

impl BulkReceiver {
    /// The next message; `None` at the peer's clean end. Cancel-safe.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        self.reader.recv().await
    }

    /// Reads the raw bytes that the message before has announced into `body`, whose allocation is
    /// reused. Refused before allocation beyond `Limits::max_body`. Not cancel-safe.
    pub async fn recv_body(&mut self, length: u64, body: &mut Vec<u8>) -> Result<(), FrameError> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.reader.recv_body(length, self.body_limit, body).await
    }
}
