//! A connection of an agent to PID 1: frames in and out without ever blocking.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crcoord_common::wire::frame::{self, FrameError, HEADER_BYTES};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::protocol::{Answer, Ask, MESSAGE_LIMIT};

/// One connection.
#[derive(Debug)]
pub(super) struct Peer {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// It is told the exit.
    pub watching: bool,
    /// It is told output as well.
    pub wants_output: bool,
    /// The exit was told.
    pub told_exit: bool,
}

impl Peer {
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Peer {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            watching: false,
            wants_output: false,
            told_exit: false,
        })
    }

    /// True while something waits to be sent.
    pub fn busy(&self) -> bool {
        !self.output.is_empty()
    }

    /// Takes what has arrived; the requests that are complete. An error or end means: drop it.
    pub fn receive(&mut self) -> Result<Vec<Ask>, FrameError> {
        let mut bytes = [0; 8192];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err(FrameError::Truncated),
            Ok(count) => self.input.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        let mut asks = Vec::new();
        while let Some(length) = frame::body_length(&self.input, MESSAGE_LIMIT)? {
            let end = HEADER_BYTES + length;
            if self.input.len() < end {
                break;
            }
            asks.push(frame::decode(&self.input[HEADER_BYTES..end])?);
            self.input.drain(..end);
        }
        Ok(asks)
    }

    /// Queues an answer and sends what can be sent.
    pub fn answer(&mut self, answer: &Answer) -> Result<(), FrameError> {
        frame::append(answer, MESSAGE_LIMIT, &mut self.output)?;
        self.flush()
    }

    /// Sends an answer with descriptors attached to its first byte (`unix(7)`, SCM_RIGHTS).
    pub fn answer_with(
        &mut self,
        answer: &Answer,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), FrameError> {
        self.flush()?;
        if self.busy() {
            // They would be attached to the rest of an earlier answer.
            return Err(FrameError::Io(io::ErrorKind::WouldBlock.into()));
        }
        let bytes = frame::encode(answer, MESSAGE_LIMIT)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(FrameError::Io(io::ErrorKind::InvalidInput.into()));
        }
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(io::Error::from)?;
        self.output.extend_from_slice(&bytes[sent..]);
        self.flush()
    }

    /// Sends what can be sent without waiting.
    pub fn flush(&mut self) -> Result<(), FrameError> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(FrameError::Truncated),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
