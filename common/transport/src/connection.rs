//! `Connection`: an authenticated peer, its streams and its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::frame::FrameError;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use serde::Serialize;
use tokio::sync::{Mutex, Semaphore};

use crate::bulk::BulkStream;
use crate::control::ControlStream;
use crate::halves::{RecvHalf, SendHalf, Share};
use crate::limits::Limits;
use crate::peer::Peer;

/// First byte of a stream that carries messages alone.
const KIND_CONTROL: u8 = 1;
/// First byte of a stream that carries messages and bodies.
const KIND_BULK: u8 = 2;

/// Streams of this priority go before bulk streams (quinn's default is 0): a heartbeat must not
/// wait for megabytes of pages.
const CONTROL_PRIORITY: i32 = 1;

/// Code of a connection or endpoint that was closed in good order.
pub const CLOSE_SHUTDOWN: u32 = 0;
/// Code of a connection closed because the peer broke the protocol. Codes from 256 on are free for
/// the daemons.
pub const CLOSE_PROTOCOL: u32 = 1;

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Nothing was heard for the idle time.
    #[error("nothing was heard from the peer for the idle time")]
    Silent,
    /// The peer closed it.
    #[error("closed by the peer (code {code}): {reason}")]
    ClosedByPeer {
        /// The peer's code, such as [`CLOSE_SHUTDOWN`].
        code: u64,
        /// The peer's words.
        reason: String,
    },
    /// We closed it.
    #[error("closed by this side")]
    ClosedHere,
    /// The peer knows nothing of this connection: it was restarted.
    #[error("the peer was restarted")]
    Restarted,
    /// One side broke the rules of QUIC or TLS.
    #[error("protocol failure: {0}")]
    Protocol(String),
}

impl From<ConnectionError> for Lost {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Lost::Silent,
            ConnectionError::LocallyClosed => Lost::ClosedHere,
            ConnectionError::Reset => Lost::Restarted,
            ConnectionError::ApplicationClosed(close) => Lost::ClosedByPeer {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            other => Lost::Protocol(other.to_string()),
        }
    }
}

/// Why a stream could not be opened or accepted.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection is gone.
    #[error("connection to {peer} at {address} lost: {reason}")]
    Lost {
        /// The peer.
        peer: Peer,
        /// Its address.
        address: SocketAddr,
        /// Why.
        reason: Lost,
    },
    /// The peer opened a stream of a kind this version does not know; other streams live on.
    #[error("{peer} opened a stream of unknown kind {kind}")]
    UnknownKind {
        /// The peer.
        peer: Peer,
        /// The first byte.
        kind: u8,
    },
    /// The stream ended before it had begun; other streams live on.
    #[error("stream with {peer} failed at its beginning: {source}")]
    Beginning {
        /// The peer.
        peer: Peer,
        /// Why.
        source: FrameError,
    },
}

impl StreamError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        match self {
            StreamError::Lost { address, .. } => {
                Report::new("transport-lost", Class::Unreachable, self.to_string())
                    .address(address.to_string())
                    .remedy("check that the peer runs and that its log shows no error")
            }
            StreamError::UnknownKind { .. } => {
                Report::new("transport-stream-kind", Class::Failure, self.to_string())
                    .remedy("run the same version on both sides")
            }
            StreamError::Beginning { .. } => {
                Report::new("transport-stream", Class::Unreachable, self.to_string())
            }
        }
    }
}

/// A stream that the peer opened.
#[derive(Debug)]
pub enum Stream {
    /// Messages alone.
    Control(ControlStream),
    /// Messages and bodies.
    Bulk(BulkStream),
}

/// A connection to a peer whose certificate was verified. Clones are handles of the same
/// connection; it closes when the last handle and stream are dropped.
#[derive(Clone, Debug)]
pub struct Connection {
    quic: quinn::Connection,
    peer: Peer,
    limits: Arc<Limits>,
    /// What is left of the number of streams we may have open.
    shares: Arc<Semaphore>,
    /// An accepted stream whose first byte has not arrived: it survives a cancelled accept.
    begun: Arc<Mutex<Option<(SendStream, RecvStream)>>>,
}

impl Connection {
    pub(crate) fn new(quic: quinn::Connection, peer: Peer, limits: Arc<Limits>) -> Self {
        Connection {
            quic,
            peer,
            shares: Arc::new(Semaphore::new(limits.max_streams as usize)),
            limits,
            begun: Arc::default(),
        }
    }

    /// Whom the peer's certificate names.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The peer's UDP address.
    pub fn remote_address(&self) -> SocketAddr {
        self.quic.remote_address()
    }

    /// The current estimate of the round trip.
    pub fn round_trip(&self) -> Duration {
        self.quic.rtt()
    }

    /// quinn's counters (datagrams, losses, congestion window, MTU), for metrics.
    pub fn statistics(&self) -> quinn::ConnectionStats {
        self.quic.stats()
    }

    /// Opens a control stream. Waits while `Limits::max_streams` are open.
    pub async fn open_control(&self) -> Result<ControlStream, StreamError> {
        let (send, recv) = self.open(KIND_CONTROL).await?;
        Ok(ControlStream::new(send, recv, self.limits.max_frame))
    }

    /// Opens a bulk stream and sends its header. Waits while `Limits::max_streams` are open.
    pub async fn open_bulk<H>(&self, header: &H) -> Result<BulkStream, StreamError>
    where
        H: Serialize + ?Sized,
    {
        let (send, recv) = self.open(KIND_BULK).await?;
        let mut stream = BulkStream::new(send, recv, &self.limits);
        let sent = stream.sender.send(header).await;
        sent.map_err(|source| self.beginning(source))?;
        Ok(stream)
    }

    /// The next stream that the peer opens. Cancel-safe.
    pub async fn accept_stream(&self) -> Result<Stream, StreamError> {
        let mut begun = self.begun.lock().await;
        if begun.is_none() {
            let accepted = self.quic.accept_bi().await;
            *begun = Some(accepted.map_err(|error| self.lost(error))?);
        }
        let mut kind = [0];
        let read = match begun.as_mut() {
            // Of one byte, so all or nothing: cancel-safe.
            Some((_, recv)) => recv.read(&mut kind).await,
            None => Ok(None), // it was filled above, under the same lock
        };
        let taken = begun.take();
        drop(begun);
        let ended = || self.beginning(FrameError::Truncated);
        let (send, recv) = taken.ok_or_else(ended)?;
        match read {
            Ok(Some(_)) => {}
            Ok(None) => return Err(ended()),
            Err(ReadError::ConnectionLost(error)) => return Err(self.lost(error)),
            Err(other) => return Err(self.beginning(FrameError::Io(other.into()))),
        }
        let send = SendHalf::new(send, None);
        let recv = RecvHalf::new(recv, None);
        match kind[0] {
            KIND_CONTROL => {
                send.set_priority(CONTROL_PRIORITY);
                let stream = ControlStream::new(send, recv, self.limits.max_frame);
                Ok(Stream::Control(stream))
            }
            KIND_BULK => Ok(Stream::Bulk(BulkStream::new(send, recv, &self.limits))),
            kind => Err(StreamError::UnknownKind {
                peer: self.peer.clone(),
                kind,
            }),
        }
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> Lost {
        self.quic.closed().await.into()
    }

    /// Why the connection has ended, if it has.
    pub fn lost_reason(&self) -> Option<Lost> {
        self.quic.close_reason().map(Lost::from)
    }

    /// Closes at once; data under way is lost, so `finish` streams first. `code` is one of the
    /// `CLOSE_` constants or 256 and above; the peer gets it with `reason`.
    pub fn close(&self, code: u32, reason: &str) {
        self.quic.close(VarInt::from_u32(code), reason.as_bytes());
    }

    async fn open(&self, kind: u8) -> Result<(SendHalf, RecvHalf), StreamError> {
        // The peer's limit may be higher than ours, but our window is sized for our own.
        let share: Share = match self.shares.clone().acquire_owned().await {
            Ok(permit) => Some(Arc::new(permit)),
            Err(_) => None, // never closed
        };
        let opened = self.quic.open_bi().await;
        let (send, recv) = opened.map_err(|error| self.lost(error))?;
        let mut send = SendHalf::new(send, share.clone());
        if kind == KIND_CONTROL {
            send.set_priority(CONTROL_PRIORITY);
        }
        // The peer learns of a stream by its first byte.
        match send.stream.write_all(&[kind]).await {
            Ok(()) => Ok((send, RecvHalf::new(recv, share))),
            Err(WriteError::ConnectionLost(error)) => Err(self.lost(error)),
            Err(other) => Err(self.beginning(FrameError::Io(other.into()))),
        }
    }

    fn lost(&self, error: ConnectionError) -> StreamError {
        StreamError::Lost {
            peer: self.peer.clone(),
            address: self.remote_address(),
            reason: error.into(),
        }
    }

    fn beginning(&self, source: FrameError) -> StreamError {
        StreamError::Beginning {
            peer: self.peer.clone(),
            source,
        }
    }
}
