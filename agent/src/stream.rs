//! Streaming of one part: pages from the engine's ring, hashed and compressed once, into the own
//! store and at the same time into every copy that was asked for; then the manifest and the seals.
//!
//! No spill file and bounded memory: at most the ring's slots are copied out at a time, and a slow
//! store or partner makes the engine wait, not the agent grow.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{MemberKey, PartKey};
use crcoord_common::image::{Architecture, ChunkId, Manifest, ManifestBody};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{CaptureSummary, CopyTarget, FromAgent};
use crcoord_common::wire::engine::{FromEngine, RING_SLOTS, Slot, ToEngine};
use crcoord_common::wire::member::{MemberCommit, Replica};
use crcoord_kernel::ring::Ring;
use crcoord_store::{
    ChunkSink, ImageStore, PartReader, PartSource, PartState, PartWriter, Sealed, StagedPart,
    StoreError,
};
use tokio::sync::mpsc;

use crate::capture::Stop;
use crate::engine_process::EngineProcess;
use crate::node::{Node, blocking};
use crate::partner::RemotePart;

/// How often the coordinator is told how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// Runs blocking work that writes for an epoch.
async fn working<T: Send + 'static>(
    at_work: &AtWork,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let held = at_work.clone();
    blocking(move || {
        let outcome = work();
        drop(held);
        outcome
    })
    .await
}

/// Where the part goes.
struct Targets {
    own: Arc<dyn StagedPart>,
    shared: Option<Arc<dyn StagedPart>>,
    partners: Vec<(Replica, Arc<RemotePart>)>,
}

/// Held by everything that writes for an epoch off the runtime: when all are dropped, nothing can
/// appear in a store any more.
pub(crate) type AtWork = mpsc::Sender<()>;

/// Streams and seals.
#[allow(clippy::too_many_arguments)]
pub(crate) async fn stream(
    node: Arc<Node>,
    at_work: AtWork,
    key: MemberKey,
    part: PartKey,
    engine: &mut EngineProcess,
    summary: CaptureSummary,
    frozen_us: u64,
    copies: Vec<CopyTarget>,
) -> Result<MemberCommit, Stop> {
    let targets = open_targets(&node, &at_work, &part, copies)
        .await
        .map_err(Stop::Failed)?;
    let mut sinks: Vec<Arc<dyn ChunkSink>> = vec![targets.own.clone()];
    if let Some(shared) = &targets.shared {
        sinks.push(shared.clone());
    }
    for (_, partner) in &targets.partners {
        sinks.push(partner.clone());
    }
    let page_size = rustix::param::page_size() as u64;
    let writer = Arc::new(PartWriter::new(page_size, sinks));

    let total_bytes = summary.memory_bytes;
    let progress = |done_bytes| FromAgent::Progress {
        key: key.clone(),
        epoch: part.epoch,
        done_bytes,
        total_bytes,
    };
    let body = take_pages(&node, &at_work, engine, &writer, page_size, progress).await?;
    let manifest = {
        let (node, part, writer) = (node.clone(), part.clone(), writer.clone());
        working(&at_work, move || {
            finish(&node, part, &writer, page_size, body)
        })
        .await
    };
    let (manifest, raw_bytes) = manifest.map_err(|error| Stop::Failed(error.report()))?;
    drop(writer);
    let (sealed, replicas) = seal(&node, &at_work, targets, manifest)
        .await
        .map_err(Stop::Failed)?;
    Ok(MemberCommit {
        member: part.member,
        node: node.settings.node.clone(),
        manifest: sealed.manifest,
        replicas,
        raw_bytes,
        stored_bytes: sealed.stored_bytes,
        freeze_us: frozen_us,
        connections: summary.connections,
    })
}

async fn open_targets(
    node: &Arc<Node>,
    at_work: &AtWork,
    part: &PartKey,
    copies: Vec<CopyTarget>,
) -> Result<Targets, Report> {
    let own = {
        let (node, part) = (node.clone(), part.clone());
        working(at_work, move || stage(&*node.store, &part))
            .await
            .map_err(|error| error.report())?
    };
    let mut targets = Targets {
        own,
        shared: None,
        partners: Vec::new(),
    };
    for copy in copies {
        match copy {
            CopyTarget::Shared => {
                let store = node.shared.clone().ok_or_else(|| {
                    Report::new(
                        "agent-no-shared",
                        Class::Failure,
                        "no shared directory is set here",
                    )
                    .remedy("set agent.shared_dir on every node")
                })?;
                let part = part.clone();
                let staged = working(at_work, move || stage(&*store, &part)).await;
                targets.shared = Some(staged.map_err(|error| error.report())?);
            }
            CopyTarget::Partner {
                node: partner,
                address,
            } => {
                let replica = Replica::Node(partner.clone());
                let believed = {
                    let (node, part, replica) = (node.clone(), part.clone(), replica.clone());
                    blocking(move || believed(&node, &part, &replica)).await
                };
                let name = partner.as_str();
                let own = targets.own.clone();
                let remote =
                    RemotePart::open(node, name, address, part.clone(), believed, own).await?;
                targets.partners.push((replica, remote));
            }
        }
    }
    Ok(targets)
}

fn stage(store: &dyn ImageStore, part: &PartKey) -> Result<Arc<dyn StagedPart>, StoreError> {
    store.abort(part)?;
    store.stage(part)
}

/// The chunks that the newest committed part of this member left with the partner. Only a saving:
/// whatever goes wrong here, the chunks are sent.
fn believed(node: &Node, part: &PartKey, replica: &Replica) -> HashSet<ChunkId> {
    let mut ids = HashSet::new();
    let outcome = || -> Result<(), StoreError> {
        let parts = node.store.parts()?;
        let newest = parts
            .into_iter()
            .rev()
            .map(|summary| (summary.part, summary.state))
            .find(|(other, state)| {
                other.job == part.job
                    && other.member == part.member
                    && other.epoch < part.epoch
                    && *state == PartState::Committed
            });
        let Some((earlier, _)) = newest else {
            return Ok(());
        };
        let record = node.store.commit_record(&earlier)?.unwrap_or_default();
        let there = CommitRecord::decode(&record).is_ok_and(|record| {
            let members = &record.members;
            members
                .iter()
                .any(|one| one.member == part.member && one.replicas.contains(replica))
        });
        if !there {
            return Ok(());
        }
        let encoded = node.store.manifest(&earlier)?;
        let Ok(manifest) = Manifest::decode_any(&encoded, &node.key) else {
            return Ok(());
        };
        let source = PartSource::new(node.store.clone(), earlier);
        PartReader::new(&manifest.body.memory, manifest.page_size.into(), &source).for_each_id(
            |_, id| {
                ids.insert(id);
                Ok(())
            },
        )
    }();
    if let Err(error) = outcome {
        tracing::warn!(%part, %error, "what the partner has is not known; everything is sent");
        ids.clear();
    }
    ids
}

/// Moves pages until the engine has given all, and its manifest body.
async fn take_pages(
    node: &Node,
    at_work: &AtWork,
    engine: &mut EngineProcess,
    writer: &Arc<PartWriter>,
    page_size: u64,
    progress: impl Fn(u64) -> FromAgent,
) -> Result<ManifestBody, Stop> {
    let doing = "streaming";
    let (filled, work) = std::sync::mpsc::channel::<Vec<Slot>>();
    let (free, mut freed) = mpsc::unbounded_channel();
    let mut storing = {
        let (ring, writer, at_work) = (engine.ring.clone(), writer.clone(), at_work.clone());
        tokio::task::spawn_blocking(move || {
            let outcome = store_pages(&work, &ring, &writer, page_size, &free);
            drop((writer, at_work));
            outcome
        })
    };
    let mut ticks = tokio::time::interval(PROGRESS);
    let body = loop {
        tokio::select! {
            message = engine.next(doing) => match message? {
                FromEngine::Pages(slots) if slots.len() <= RING_SLOTS as usize => {
                    if filled.send(slots).is_err() {
                        break Err(()); // the store failed: told below
                    }
                }
                FromEngine::Body(body) => break Ok(*body),
                _ => return Err(engine.unexpected(doing).into()),
            },
            Some(slots) = freed.recv() => {
                // An engine that has said everything ends at once and needs no slots: where it has
                // ended too early, that is heard above.
                let _ = engine.send(&ToEngine::Free(slots)).await;
            }
            outcome = &mut storing => return Err(Stop::Failed(stored(outcome).err().unwrap_or_else(
                || Report::new("agent-stream", Class::Failure, "the store ended early"),
            ))),
            _ = ticks.tick() => node.outbox.event(progress(writer.progress().given_bytes)),
        }
    };
    drop(filled);
    stored(storing.await).map_err(Stop::Failed)?;
    node.outbox.event(progress(writer.progress().given_bytes));
    body.map_err(|()| {
        Stop::Failed(Report::new(
            "agent-stream",
            Class::Failure,
            "the store ended early",
        ))
    })
}

fn stored(outcome: Result<Result<(), StoreError>, tokio::task::JoinError>) -> Result<(), Report> {
    match outcome {
        Ok(stored) => stored.map_err(|error| error.report()),
        Err(error) => Err(Report::new(
            "agent-stream",
            Class::Failure,
            error.to_string(),
        )),
    }
}

/// Copies each batch out of the ring, gives its slots back at once, then stores it.
fn store_pages(
    work: &std::sync::mpsc::Receiver<Vec<Slot>>,
    ring: &Ring,
    writer: &PartWriter,
    page_size: u64,
    free: &mpsc::UnboundedSender<Vec<u32>>,
) -> Result<(), StoreError> {
    while let Ok(slots) = work.recv() {
        let mut pages = Vec::with_capacity(slots.len());
        for slot in &slots {
            let length = usize::try_from(slot.run.bytes(page_size)).unwrap_or(usize::MAX);
            let bytes = ring.read(slot.slot, length).map_err(|error| {
                let text = format!("the engine named a slot that does not exist: {error}");
                StoreError::Other(Box::new(Report::new("agent-ring", Class::Failure, text)))
            })?;
            pages.push((slot.run, bytes));
        }
        // Where nobody listens the engine has gone, which is told elsewhere.
        let _ = free.send(slots.iter().map(|slot| slot.slot).collect());
        let runs: Vec<_> = pages
            .iter()
            .map(|(run, bytes)| (*run, bytes.as_slice()))
            .collect();
        writer.put_all(&runs)?;
    }
    Ok(())
}

/// The encoded manifest and the bytes of memory in it.
fn finish(
    node: &Node,
    part: PartKey,
    writer: &PartWriter,
    page_size: u64,
    mut body: ManifestBody,
) -> Result<(Vec<u8>, u64), StoreError> {
    for entry in &body.memory {
        writer.declare(entry.object);
    }
    body.memory = writer.finish()?;
    body.part = Some(part);
    body.node = Some(node.settings.node.clone());
    body.taken = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let raw_bytes = body.memory.iter().map(|entry| entry.bytes).sum();
    let page_size = u32::try_from(page_size).unwrap_or(u32::MAX);
    let manifest = Manifest {
        architecture: Architecture::NATIVE,
        page_size,
        body,
    };
    Ok((manifest.encode(&node.key), raw_bytes))
}

/// Makes all copies durable; the own one last, so that it never claims what the others lack.
async fn seal(
    node: &Node,
    at_work: &AtWork,
    targets: Targets,
    manifest: Vec<u8>,
) -> Result<(Sealed, Vec<Replica>), Report> {
    let mut replicas = vec![Replica::Node(node.settings.node.clone())];
    for (replica, partner) in &targets.partners {
        partner.seal(&manifest).await?;
        replicas.push(replica.clone());
    }
    let manifest = Arc::new(manifest);
    if let Some(shared) = targets.shared {
        let manifest = manifest.clone();
        working(at_work, move || shared.seal(&manifest))
            .await
            .map_err(|error| error.report())?;
        replicas.push(Replica::Shared);
    }
    let own = targets.own;
    let sealed = working(at_work, move || own.seal(&manifest))
        .await
        .map_err(|error| error.report())?;
    Ok((sealed, replicas))
}
