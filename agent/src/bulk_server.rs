//! Serves other agents: takes parts into the own store (Put) and gives them out (Fetch).

use std::sync::Arc;

use crcoord_common::ids::PartKey;
use crcoord_common::image::{ChunkId, Manifest};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::bulk::{BulkHeader, FetchAnswer, FetchMessage, PutAnswer, PutMessage};
use crcoord_store::{EncodedChunk, PartReader, StagedPart, StoreError};
use crcoord_transport::{
    BulkReceiver, BulkSender, BulkStream, Connection, Role, Stream, StreamError,
};
use rayon::prelude::*;
use tokio::sync::mpsc;

use crate::node::{Node, blocking};
use crate::partner::{IDS_AT_ONCE, TransferError};

/// Chunks verified and stored at a time.
const CHUNKS_AT_ONCE: usize = 32;
/// Batches that wait for the store.
const BATCHES_WAITING: usize = 4;

/// Serves everybody who calls, for ever.
pub async fn serve(node: Arc<Node>) {
    while let Some(connection) = node.endpoint.accept().await {
        if connection.peer().role() != Role::Node {
            tracing::warn!(peer = %connection.peer(), "refused: only agents call agents");
            connection.close(crcoord_transport::CLOSE_PROTOCOL, "only agents call agents");
            continue;
        }
        tokio::spawn(serve_peer(node.clone(), connection));
    }
}

async fn serve_peer(node: Arc<Node>, connection: Connection) {
    loop {
        match connection.accept_stream().await {
            Ok(Stream::Bulk(stream)) => {
                let (node, peer) = (node.clone(), connection.peer().name().to_owned());
                tokio::spawn(async move { serve_stream(node, peer, stream).await });
            }
            Ok(Stream::Control(_)) => tracing::warn!(peer = %connection.peer(), "unasked control"),
            Err(StreamError::Lost { reason, .. }) => {
                tracing::debug!(peer = %connection.peer(), %reason, "an agent has gone");
                return;
            }
            Err(error) => tracing::warn!(%error, "a stream was not taken"),
        }
    }
}

async fn serve_stream(node: Arc<Node>, peer: String, stream: BulkStream) {
    let (mut sender, mut receiver) = stream.split();
    let header = receiver.recv::<BulkHeader>().await;
    let outcome = match header {
        Ok(Some(BulkHeader::Put {
            version: WIRE_VERSION,
            part,
        })) => {
            let outcome = take(&node, &part, &mut sender, &mut receiver).await;
            if let Err(TransferError(report)) = &outcome {
                tracing::warn!(%part, peer, %report, "a part was not taken");
                let refusal = PutAnswer::Failed(node.here(report.clone()));
                let _ = sender.send(&refusal).await; // the peer may have gone
                drop_part(&node, &part).await;
            }
            outcome
        }
        Ok(Some(BulkHeader::Fetch {
            version: WIRE_VERSION,
            part,
        })) => {
            let outcome = give(&node, &part, &mut sender, &mut receiver).await;
            if let Err(TransferError(report)) = &outcome {
                tracing::warn!(%part, peer, %report, "a part was not given");
                let refusal = FetchAnswer::Failed(node.here(report.clone()));
                let _ = sender.send(&refusal).await; // the peer may have gone
            }
            outcome
        }
        Ok(Some(BulkHeader::Put { version, .. } | BulkHeader::Fetch { version, .. })) => {
            tracing::warn!(peer, version, "an agent of another version was refused");
            return;
        }
        Ok(None) => return,
        Err(error) => {
            tracing::warn!(peer, %error, "a stream without header");
            return;
        }
    };
    // An error leaves with its message; the peer's receipt of it needs the clean end as well.
    if let Err(error) = sender.finish().await
        && outcome.is_ok()
    {
        tracing::debug!(peer, %error, "the last answer may not have arrived");
    }
}

/// What was left of an attempt; never a committed part.
async fn drop_part(node: &Arc<Node>, part: &PartKey) {
    let (node, part) = (node.clone(), part.clone());
    let dropped = blocking(move || node.store.abort(&part)).await;
    if let Err(error) = dropped {
        tracing::warn!(%error, "an interrupted part is left for the next clean-up");
    }
}

async fn take(
    node: &Arc<Node>,
    part: &PartKey,
    sender: &mut BulkSender,
    receiver: &mut BulkReceiver,
) -> Result<(), TransferError> {
    let staged: Arc<dyn StagedPart> = {
        let (node, part) = (node.clone(), part.clone());
        blocking(move || stage_with_room(&node, &part)).await?
    };
    let (batches, mut waiting) = mpsc::channel::<Vec<Raw>>(BATCHES_WAITING);
    let storing = {
        let staged = staged.clone();
        tokio::task::spawn_blocking(move || -> Result<(), StoreError> {
            while let Some(batch) = waiting.blocking_recv() {
                batch.into_par_iter().try_for_each(|raw| {
                    let chunk = EncodedChunk::verified(raw.id, raw.codec, raw.raw, raw.bytes)?;
                    staged.append(&chunk).map(|_| ())
                })?;
            }
            Ok(())
        })
    };
    let received = receive(&staged, sender, receiver, batches).await;
    // The store's own reason is the better one.
    match storing.await {
        Ok(stored) => stored?,
        Err(error) => return Err(TransferError(failure("agent-put", error.to_string()))),
    }
    let manifest = received?;
    let digest = {
        let (node, part) = (node.clone(), part.clone());
        blocking(move || seal_checked(&node, &part, &*staged, &manifest)).await?
    };
    sender.send(&PutAnswer::Sealed { manifest: digest }).await?;
    tracing::info!(%part, "a partner's part is durable here");
    Ok(())
}

fn stage_with_room(node: &Node, part: &PartKey) -> Result<Arc<dyn StagedPart>, StoreError> {
    let free = node.store.free_bytes()?;
    if free < node.settings.min_free_bytes {
        return Err(StoreError::Other(Box::new(no_room(
            free,
            node.settings.min_free_bytes,
        ))));
    }
    node.store.stage(part)
}

/// The report of a store that is nearly full.
pub(crate) fn no_room(free: u64, wanted: u64) -> Report {
    Report::new(
        "agent-store-full",
        Class::Obstacle,
        format!("the store has {free} bytes left, {wanted} must stay free"),
    )
    .remedy("retire old epochs, or lower agent.min_free")
}

struct Raw {
    id: ChunkId,
    codec: u8,
    raw: u32,
    bytes: Vec<u8>,
}

/// Takes everything up to the manifest.
async fn receive(
    staged: &Arc<dyn StagedPart>,
    sender: &mut BulkSender,
    receiver: &mut BulkReceiver,
    batches: mpsc::Sender<Vec<Raw>>,
) -> Result<Vec<u8>, TransferError> {
    let ended = || TransferError(failure("agent-put-store", "the store takes no more".into()));
    let mut batch = Vec::new();
    loop {
        match receiver.recv::<PutMessage>().await? {
            Some(PutMessage::Chunk {
                id,
                codec,
                raw,
                stored,
            }) => {
                if stored > crcoord_store::RAW_LIMIT {
                    return Err(TransferError(failure(
                        "agent-put-chunk",
                        format!("a chunk of {stored} bytes is refused"),
                    )));
                }
                let mut bytes = Vec::new();
                receiver.recv_body(stored.into(), &mut bytes).await?;
                batch.push(Raw {
                    id,
                    codec,
                    raw,
                    bytes,
                });
                if batch.len() >= CHUNKS_AT_ONCE {
                    batches
                        .send(std::mem::take(&mut batch))
                        .await
                        .map_err(|_| ended())?;
                }
            }
            Some(PutMessage::Known { ids }) => {
                let staged = staged.clone();
                let missing = blocking(move || missing_of(&*staged, ids)).await?;
                sender.send(&PutAnswer::Missing { ids: missing }).await?;
            }
            Some(PutMessage::Seal { manifest }) => {
                if !batch.is_empty() {
                    batches.send(batch).await.map_err(|_| ended())?;
                }
                let mut bytes = Vec::new();
                receiver.recv_body(manifest, &mut bytes).await?;
                return Ok(bytes);
            }
            None => {
                return Err(TransferError(failure(
                    "agent-put-end",
                    "the part ended without its manifest".into(),
                )));
            }
        }
    }
}

fn missing_of(staged: &dyn StagedPart, ids: Vec<ChunkId>) -> Result<Vec<ChunkId>, StoreError> {
    if ids.len() > IDS_AT_ONCE {
        let report = failure(
            "agent-put-known",
            format!("{} ids at once are refused", ids.len()),
        );
        return Err(StoreError::Other(Box::new(report)));
    }
    let mut missing = Vec::new();
    for id in ids {
        if !staged.note_known(id)? {
            missing.push(id);
        }
    }
    Ok(missing)
}

/// Seals only what is this part, authentic, and whole: every chunk that its index names is here.
fn seal_checked(
    node: &Node,
    part: &PartKey,
    staged: &dyn StagedPart,
    encoded: &[u8],
) -> Result<ChunkId, StoreError> {
    let refused = |text: String| StoreError::Other(Box::new(failure("agent-put-manifest", text)));
    let manifest =
        Manifest::decode_any(encoded, &node.key).map_err(|error| refused(error.to_string()))?;
    if manifest.body.part.as_ref() != Some(part) {
        return Err(refused("the manifest is of another part".into()));
    }
    let page_size = u64::from(manifest.page_size);
    PartReader::new(&manifest.body.memory, page_size, &Staged(staged)).for_each_id(|_, id| {
        match staged.note_known(id)? {
            true => Ok(()),
            false => Err(refused(format!("chunk {id} was never sent"))),
        }
    })?;
    Ok(staged.seal(encoded)?.manifest)
}

/// A staged part as a source of chunks alone.
struct Staged<'a>(&'a dyn StagedPart);

impl crcoord_store::ChunkSource for Staged<'_> {
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        self.0.encoded(id)
    }
}

async fn give(
    node: &Arc<Node>,
    part: &PartKey,
    sender: &mut BulkSender,
    receiver: &mut BulkReceiver,
) -> Result<(), TransferError> {
    while let Some(message) = receiver.recv::<FetchMessage>().await? {
        match message {
            FetchMessage::Manifest => {
                let (node, part) = (node.clone(), part.clone());
                let (manifest, record) = blocking(move || -> Result<_, StoreError> {
                    let record = node.store.commit_record(&part)?.unwrap_or_default();
                    Ok((node.store.manifest(&part)?, record))
                })
                .await?;
                let answer = FetchAnswer::Manifest {
                    manifest: manifest.len() as u64,
                    record: record.len() as u64,
                };
                sender.send(&answer).await?;
                sender.send_body(&manifest).await?;
                sender.send_body(&record).await?;
            }
            FetchMessage::Chunks { ids } => {
                if ids.len() > IDS_AT_ONCE {
                    let text = format!("{} ids at once are refused", ids.len());
                    return Err(TransferError(failure("agent-fetch-ids", text)));
                }
                for some in ids.chunks(CHUNKS_AT_ONCE) {
                    give_chunks(node, part, some, sender).await?;
                }
            }
        }
    }
    Ok(())
}

async fn give_chunks(
    node: &Arc<Node>,
    part: &PartKey,
    ids: &[ChunkId],
    sender: &mut BulkSender,
) -> Result<(), TransferError> {
    let (node, part, ids) = (node.clone(), part.clone(), ids.to_vec());
    let chunks = blocking(move || -> Result<Vec<EncodedChunk>, StoreError> {
        ids.par_iter()
            .map(|id| node.store.read_encoded(&part, *id))
            .collect()
    })
    .await?;
    for chunk in chunks {
        let stored = u32::try_from(chunk.bytes.len()).unwrap_or(u32::MAX);
        let answer = FetchAnswer::Chunk {
            id: chunk.id,
            codec: chunk.codec as u8,
            raw: chunk.raw_length,
            stored,
        };
        sender.send(&answer).await?;
        sender.send_body(&chunk.bytes).await?;
    }
    Ok(())
}

fn failure(code: &str, text: String) -> Report {
    Report::new(code, Class::Failure, text)
}
