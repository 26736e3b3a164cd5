//! The halves of a QUIC stream. A sending half says "broken off" and not "done" when it is dropped.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::{RecvStream, SendStream, VarInt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

/// The code of a stream reset because its sender was dropped before the end.
pub(crate) const BROKEN_OFF: VarInt = VarInt::from_u32(1);

/// Part of our share of a connection's stream limit; given back when both halves are gone.
pub(crate) type Share = Option<Arc<OwnedSemaphorePermit>>;

/// quinn ends a dropped stream as if it were complete; a receiver could then take the half of an
/// image that a cancelled task had sent for the whole. This half resets the stream instead.
#[derive(Debug)]
pub(crate) struct SendHalf {
    pub(crate) stream: SendStream,
    complete: bool,
    _share: Share,
}

impl SendHalf {
    pub(crate) fn new(stream: SendStream, share: Share) -> Self {
        SendHalf {
            stream,
            complete: false,
            _share: share,
        }
    }

    /// Sends this stream's bytes before those of streams with lower priority.
    pub(crate) fn set_priority(&self, priority: i32) {
        // Fails only where the stream has ended already.
        let _ = self.stream.set_priority(priority);
    }

    /// Waits until the peer's transport has acknowledged everything. The stream must be shut down.
    pub(crate) async fn delivered(self) -> io::Result<()> {
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                format!("peer stopped reading before the end (code {code})"),
            )),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsyncWrite for SendHalf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.stream), context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(context);
        self.complete |= matches!(result, Poll::Ready(Ok(())));
        result
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if !self.complete {
            // Fails only where the stream has ended already.
            let _ = self.stream.reset(BROKEN_OFF);
        }
    }
}

/// The receiving half; dropping it tells the peer to stop sending.
#[derive(Debug)]
pub(crate) struct RecvHalf {
    stream: RecvStream,
    _share: Share,
}

impl RecvHalf {
    pub(crate) fn new(stream: RecvStream, share: Share) -> Self {
        RecvHalf {
            stream,
            _share: share,
        }
    }
}

impl AsyncRead for RecvHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.stream), context, buffer)
    }
}
