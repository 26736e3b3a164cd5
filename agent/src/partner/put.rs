//! Putting a part into another agent's store, as a sink of chunks beside the own store.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use crcoord_common::ids::PartKey;
use crcoord_common::image::ChunkId;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::bulk::{BulkHeader, PutAnswer, PutMessage};
use crcoord_store::{ChunkSink, EncodedChunk, PutOutcome, StagedPart, StoreError};
use crcoord_transport::{BulkReceiver, BulkSender, FrameError};
use tokio::sync::{mpsc, watch};

use super::{CHUNKS_WAITING, IDS_AT_ONCE, broken_off};
use crate::node::{Node, blocking, locked};

enum Out {
    Chunk(EncodedChunk),
    Known(Vec<ChunkId>),
    Seal(Vec<u8>),
}

/// A part that is being put into another agent's store.
pub struct RemotePart {
    out: mpsc::Sender<Out>,
    taken: Mutex<Taken>,
    progress: watch::Receiver<Progress>,
    asked: watch::Sender<u64>,
}

/// What was given so far.
#[derive(Default)]
struct Taken {
    ids: HashSet<ChunkId>,
    believed: HashSet<ChunkId>,
    claims: Vec<ChunkId>,
    failed: bool,
}

/// What the other side said so far.
#[derive(Clone, Debug, Default)]
struct Progress {
    answered: u64,
    sealed: Option<ChunkId>,
    failure: Option<Report>,
}

impl RemotePart {
    /// Opens a stream. `believed` are chunks that an earlier part left there; where that turns out
    /// wrong, `own` gives their bytes.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub async fn open(
        node: &Node,
        partner: &str,
        address: SocketAddr,
        part: PartKey,
        believed: HashSet<ChunkId>,
        own: Arc<dyn StagedPart>,
    ) -> Result<Arc<Self>, Report> {
        let connection = node
            .partner_of_now(partner, address)
            .await
            .map_err(|error| error.report())?;
        let header = BulkHeader::Put {
            version: WIRE_VERSION,
            part,
        };
        let stream = connection
            .open_bulk(&header)
            .await
            .map_err(|error| error.report())?;
        let (sender, receiver) = stream.split();
        let (out, waiting) = mpsc::channel(CHUNKS_WAITING);
        let (told, progress) = watch::channel(Progress::default());
        let told = Arc::new(told);
        tokio::spawn(send_part(sender, waiting, told.clone()));
        tokio::spawn(hear_part(receiver, out.clone(), told, own));
        Ok(Arc::new(RemotePart {
            out,
            taken: Mutex::new(Taken {
                believed,
                ..Taken::default()
            }),
            progress,
            asked: watch::Sender::new(0),
        }))
    }

    /// Ends the part with its manifest; returns when it is durable there.
    ///
    /// # Errors
    /// The other side's reason, or the connection's.
    pub async fn seal(&self, manifest: &[u8]) -> Result<(), Report> {
        let claims = std::mem::take(&mut locked(&self.taken).claims);
        if !claims.is_empty() {
            self.asked.send_modify(|asked| *asked += 1);
            self.send(Out::Known(claims)).await?;
        }
        let asked = *self.asked.borrow();
        self.until(|progress| progress.answered >= asked).await?;
        self.send(Out::Seal(manifest.to_vec())).await?;
        let progress = self.until(|progress| progress.sealed.is_some()).await?;
        match progress.sealed == Some(ChunkId::of(manifest)) {
            true => Ok(()),
            false => Err(Report::new(
                "agent-partner-digest",
                Class::Failure,
                "the partner sealed another manifest than was sent",
            )),
        }
    }

    async fn send(&self, out: Out) -> Result<(), Report> {
        self.out.send(out).await.map_err(|_| self.failure())
    }

    async fn until(&self, mut done: impl FnMut(&Progress) -> bool) -> Result<Progress, Report> {
        let mut progress = self.progress.clone();
        let reached = progress
            .wait_for(|now| now.failure.is_some() || done(now))
            .await;
        match reached {
            Ok(now) => match &now.failure {
                None => Ok(now.clone()),
                Some(report) => Err(report.clone()),
            },
            Err(_) => Err(self.failure()),
        }
    }

    fn failure(&self) -> Report {
        self.progress
            .borrow()
            .failure
            .clone()
            .unwrap_or_else(broken_off)
    }

    fn failed(&self) -> StoreError {
        StoreError::Other(Box::new(self.failure()))
    }

    fn check(&self) -> Result<(), StoreError> {
        match self.progress.borrow().failure {
            None => Ok(()),
            Some(_) => Err(self.failed()),
        }
    }
}

impl ChunkSink for RemotePart {
    fn note_known(&self, id: ChunkId) -> Result<bool, StoreError> {
        self.check()?;
        let mut taken = locked(&self.taken);
        if taken.ids.contains(&id) {
            return Ok(true);
        }
        if !taken.believed.contains(&id) {
            return Ok(false);
        }
        taken.ids.insert(id);
        taken.claims.push(id);
        if taken.claims.len() < IDS_AT_ONCE {
            return Ok(true);
        }
        let claims = std::mem::take(&mut taken.claims);
        self.asked.send_modify(|asked| *asked += 1);
        drop(taken);
        self.out
            .blocking_send(Out::Known(claims))
            .map_err(|_| self.failed())?;
        Ok(true)
    }

    fn append(&self, chunk: &EncodedChunk) -> Result<PutOutcome, StoreError> {
        self.check()?;
        {
            let mut taken = locked(&self.taken);
            if taken.failed {
                return Err(self.failed());
            }
            if !taken.ids.insert(chunk.id) {
                return Ok(PutOutcome::Known);
            }
        }
        match self.out.blocking_send(Out::Chunk(chunk.clone())) {
            // Counted where it is stored; here it cost the network only.
            Ok(()) => Ok(PutOutcome::New(0)),
            Err(_) => {
                locked(&self.taken).failed = true;
                Err(self.failed())
            }
        }
    }
}

async fn send_part(
    mut sender: BulkSender,
    mut waiting: mpsc::Receiver<Out>,
    told: Arc<watch::Sender<Progress>>,
) {
    let work = async {
        while let Some(out) = waiting.recv().await {
            match out {
                Out::Chunk(chunk) => send_chunk(&mut sender, chunk).await?,
                Out::Known(ids) => sender.send(&PutMessage::Known { ids }).await?,
                Out::Seal(manifest) => {
                    sender
                        .send(&PutMessage::Seal {
                            manifest: manifest.len() as u64,
                        })
                        .await?;
                    sender.send_body(&manifest).await?;
                    return sender.finish().await;
                }
            }
        }
        Ok(()) // given up: the dropped sender resets the stream
    };
    if let Err(error) = work.await {
        told.send_modify(|progress| {
            progress.failure.get_or_insert_with(|| error.report());
        });
    }
}

async fn send_chunk(sender: &mut BulkSender, chunk: EncodedChunk) -> Result<(), FrameError> {
    let stored = u32::try_from(chunk.bytes.len()).unwrap_or(u32::MAX);
    let message = PutMessage::Chunk {
        id: chunk.id,
        codec: chunk.codec as u8,
        raw: chunk.raw_length,
        stored,
    };
    sender.send(&message).await?;
    sender.send_body(&chunk.bytes).await
}

async fn hear_part(
    mut receiver: BulkReceiver,
    out: mpsc::Sender<Out>,
    told: Arc<watch::Sender<Progress>>,
    own: Arc<dyn StagedPart>,
) {
    let out = out.downgrade(); // the part's owner alone decides how long it is sent
    let failure = loop {
        match receiver.recv::<PutAnswer>().await {
            Ok(Some(PutAnswer::Missing { ids })) => {
                let (out, own) = (out.clone(), own.clone());
                let resent = blocking(move || resend(&ids, &*own, &out)).await;
                if let Err(error) = resent {
                    break error.report();
                }
                told.send_modify(|progress| progress.answered += 1);
            }
            Ok(Some(PutAnswer::Sealed { manifest })) => {
                told.send_modify(|progress| progress.sealed = Some(manifest));
                return;
            }
            Ok(Some(PutAnswer::Failed(report))) => break report,
            Ok(None) => break broken_off(),
            Err(error) => break error.report(),
        }
    };
    told.send_modify(|progress| {
        progress.failure.get_or_insert(failure);
    });
}

fn resend(
    ids: &[ChunkId],
    own: &dyn StagedPart,
    out: &mpsc::WeakSender<Out>,
) -> Result<(), StoreError> {
    for id in ids {
        let chunk = own.encoded(*id)?;
        let gone = || StoreError::Other(Box::new(broken_off()));
        let out = out.upgrade().ok_or_else(gone)?;
        out.blocking_send(Out::Chunk(chunk)).map_err(|_| gone())?;
    }
    Ok(())
}
