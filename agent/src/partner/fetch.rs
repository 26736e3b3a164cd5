//! Fetching a part out of another agent's store, as a source of chunks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crcoord_common::ids::PartKey;
use crcoord_common::image::ChunkId;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::bulk::{BulkHeader, FetchAnswer, FetchMessage};
use crcoord_store::{ChunkSource, EncodedChunk, StoreError};
use crcoord_transport::{BulkReceiver, BulkSender};
use tokio::sync::{mpsc, oneshot};

use super::{CHUNKS_WAITING, TransferError, broken_off};
use crate::node::Node;

/// A part in another agent's store.
pub struct RemoteSource {
    wanted: mpsc::Sender<Waiting>,
    fetched: Arc<AtomicU64>,
}

/// What comes first of a fetched part.
pub struct Fetched {
    /// The encoded manifest, unchecked.
    pub manifest: Vec<u8>,
    /// The commit record beside it; empty when there is none.
    pub record: Vec<u8>,
    /// Its chunks.
    pub source: Arc<RemoteSource>,
}

impl RemoteSource {
    /// Opens a stream and reads manifest and commit record.
    ///
    /// # Errors
    /// When the agent cannot be reached or does not hold the part.
    pub async fn open(
        node: &Node,
        partner: &str,
        address: SocketAddr,
        part: PartKey,
    ) -> Result<Fetched, Report> {
        let connection = node
            .partner(partner, address)
            .await
            .map_err(|error| error.report())?;
        let header = BulkHeader::Fetch {
            version: WIRE_VERSION,
            part,
        };
        let stream = connection
            .open_bulk(&header)
            .await
            .map_err(|error| error.report())?;
        let (mut sender, mut receiver) = stream.split();
        let first = async {
            sender.send(&FetchMessage::Manifest).await?;
            match receiver.recv().await? {
                Some(FetchAnswer::Manifest { manifest, record }) => {
                    let (mut first, mut second) = (Vec::new(), Vec::new());
                    receiver.recv_body(manifest, &mut first).await?;
                    receiver.recv_body(record, &mut second).await?;
                    Ok((first, second))
                }
                Some(FetchAnswer::Failed(report)) => Err(TransferError(report)),
                _ => Err(TransferError(broken_off())),
            }
        };
        let (manifest, record) = first.await.map_err(|TransferError(report)| report)?;
        let (wanted, wishes) = mpsc::channel(CHUNKS_WAITING);
        let fetched = Arc::default();
        let (waiting, answers) = mpsc::channel(CHUNKS_WAITING);
        tokio::spawn(send_wishes(sender, wishes, waiting));
        tokio::spawn(hear_chunks(receiver, answers, Arc::clone(&fetched)));
        Ok(Fetched {
            manifest,
            record,
            source: Arc::new(RemoteSource { wanted, fetched }),
        })
    }

    /// Bytes of chunks that came so far.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }
}

impl ChunkSource for RemoteSource {
    /// Blocks for a round trip; callers read with several threads.
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        let gone = || StoreError::Other(Box::new(broken_off()));
        let (answer, chunk) = oneshot::channel();
        self.wanted
            .blocking_send((id, answer))
            .map_err(|_| gone())?;
        match chunk.blocking_recv() {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(report)) => Err(StoreError::Other(Box::new(report))),
            Err(_) => Err(gone()),
        }
    }
}

type Waiting = (ChunkId, oneshot::Sender<Result<EncodedChunk, Report>>);

/// Sends what is wanted in the order in which it is wanted, several ids in one message.
async fn send_wishes(
    mut sender: BulkSender,
    mut wishes: mpsc::Receiver<Waiting>,
    waiting: mpsc::Sender<Waiting>,
) {
    let mut batch = Vec::new();
    while wishes.recv_many(&mut batch, CHUNKS_WAITING).await > 0 {
        let ids = batch.iter().map(|(id, _)| *id).collect();
        for one in batch.drain(..) {
            if waiting.send(one).await.is_err() {
                return; // the answers have ended: what is dropped here fails
            }
        }
        if sender.send(&FetchMessage::Chunks { ids }).await.is_err() {
            return;
        }
    }
    // The other side may have gone first; all that was wanted has come by then.
    let _ = sender.finish().await;
}

async fn hear_chunks(
    mut receiver: BulkReceiver,
    mut waiting: mpsc::Receiver<Waiting>,
    fetched: Arc<AtomicU64>,
) {
    while let Some((id, answer)) = waiting.recv().await {
        let outcome = hear_chunk(&mut receiver, id).await;
        let ended = outcome.is_err();
        if let Ok(chunk) = &outcome {
            let bytes = chunk.bytes.len() as u64;
            fetched.fetch_add(bytes, Ordering::Relaxed);
        }
        // Nobody waits any more where the restore has failed meanwhile.
        let _ = answer.send(outcome.map_err(|TransferError(report)| report));
        if ended {
            return;
        }
    }
}

async fn hear_chunk(
    receiver: &mut BulkReceiver,
    wanted: ChunkId,
) -> Result<EncodedChunk, TransferError> {
    match receiver.recv().await? {
        Some(FetchAnswer::Chunk {
            id,
            codec,
            raw,
            stored,
        }) if id == wanted => {
            let mut bytes = Vec::new();
            receiver.recv_body(stored.into(), &mut bytes).await?;
            // The readers decode and verify it, each on its own thread.
            let codec = crcoord_store::Codec::from_byte(codec).ok_or_else(|| {
                TransferError(Report::new(
                    "agent-partner-codec",
                    Class::Failure,
                    "unknown codec",
                ))
            })?;
            Ok(EncodedChunk {
                id,
                codec,
                raw_length: raw,
                bytes,
            })
        }
        Some(FetchAnswer::Failed(report)) => Err(TransferError(report)),
        _ => Err(TransferError(broken_off())),
    }
}
