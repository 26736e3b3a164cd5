//! A member's standard streams where they are pipes held by PID 1 ([`Stdio::Caller`]).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crcoord_common::wire::member::Stdio;
use rustix::fs::{OFlags, fcntl_setfl, fstat};
use rustix::pipe::{PipeFlags, pipe_with};

use super::protocol::{OUTPUT_BYTES, StreamIdentity};

/// One output stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// 1 or 2.
    pub number: u8,
    /// `stdout` or `stderr`.
    pub name: &'static str,
    reader: File,
    writer: Option<OwnedFd>,
    identity: StreamIdentity,
    ended: bool,
}

impl Stream {
    fn new(number: u8, name: &'static str) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // Of the reading end alone: the program's end must block as pipes do.
        fcntl_setfl(&reader, OFlags::NONBLOCK)?;
        let stat = fstat(&reader)?;
        let identity = StreamIdentity {
            name: name.to_owned(),
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        Ok(Stream {
            number,
            name,
            reader: File::from(reader),
            writer: Some(writer),
            identity,
            ended: false,
        })
    }

    /// The program's end, until it was given away.
    pub fn writer(&self) -> Option<BorrowedFd<'_>> {
        self.writer.as_ref().map(|writer| writer.as_fd())
    }

    /// True when nobody can write any more and all was read.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// What is in the pipe now; `None` when it is empty or at its end.
    pub fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; OUTPUT_BYTES];
        match self.reader.read(&mut bytes) {
            Ok(0) => {
                self.ended = true;
                Ok(None)
            }
            Ok(count) => {
                bytes.truncate(count);
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// Makes the pipes that these standard streams need.
pub(super) fn open(stdio: &Stdio) -> io::Result<Vec<Stream>> {
    match stdio {
        Stdio::Files { .. } => Ok(Vec::new()),
        Stdio::Caller => Ok(vec![Stream::new(1, "stdout")?, Stream::new(2, "stderr")?]),
    }
}

/// Forgets the program's ends, so that the streams end with the last process that has them.
pub(super) fn give_away(streams: &mut [Stream]) {
    streams.iter_mut().for_each(|stream| stream.writer = None);
}

/// What the kernel calls them.
pub(super) fn identities(streams: &[Stream]) -> Vec<StreamIdentity> {
    streams
        .iter()
        .map(|stream| stream.identity.clone())
        .collect()
}
