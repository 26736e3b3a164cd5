//! Building a member from an image: capsule, image, engine; then everything waits for Resume.
//!
//! Whatever fails, the capsule is killed, and with it all that is half built; the image is only read.

use std::sync::Arc;
use std::time::Duration;

use crcoord_common::ids::{MemberKey, NodeName, PartKey};
use crcoord_common::image::{Manifest, ManifestBody, ManifestError, PageRun};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{FromAgent, RestoreOrder, Source};
use crcoord_common::wire::engine::{FromEngine, RING_SLOTS, RestoreTarget, Slot, ToEngine};
use crcoord_common::wire::member::{CapsuleSpec, Replica};
use crcoord_kernel::ring::Ring;
use crcoord_store::{ChunkSource, ImageStore, PartReader, PartSource, PartState, StoreError};
use tokio::sync::mpsc;

use crate::capsule::protocol::Ask;
use crate::engine_process::{EngineError, EngineProcess, FIRST_SUBSTITUTION};
use crate::members::{self, Member, make_capsule};
use crate::node::{Node, blocking, locked};
use crate::partner::{Fetched, RemoteSource};

/// Threads that read, fetch and verify ahead of the engine.
const READERS: usize = 8;
/// How long the engine may take for one step that moves no pages.
const PATIENCE: Duration = Duration::from_secs(600);

/// A built tree that waits for the word to run. Dropped, its engine kills what it has built.
#[derive(Debug)]
pub struct Built {
    engine: EngineProcess,
    root: i32,
}

/// An image that is ready to be read.
struct Image {
    body: ManifestBody,
    page_size: u64,
    source: Arc<dyn ChunkSource>,
    remote: Option<Arc<RemoteSource>>,
    replica: Option<Replica>,
    fetched_bytes: u64,
}

/// Builds a member.
///
/// # Errors
/// A report; nothing is left then.
pub async fn build(
    node: &Arc<Node>,
    key: MemberKey,
    spec: CapsuleSpec,
    order: RestoreOrder,
) -> Result<FromAgent, Report> {
    let _gate = node.members.gate(&key).await;
    if node.members.get(&key).is_some() {
        let text = format!("member {key} is here already");
        return Err(Report::new("agent-member-exists", Class::Failure, text)
            .remedy("restart in a new incarnation"));
    }
    // The image first: without one there is nothing to clean up.
    let image = find_image(node, &order).await?;
    let member = make_capsule(node, key, spec).await?;
    match build_in(node, &member, order, image).await {
        Ok(answer) => {
            give_up_later(node, &member);
            Ok(answer)
        }
        Err(report) => {
            members::discard(node, &member).await;
            Err(report)
        }
    }
}

/// Lets a built member run.
///
/// # Errors
/// A report; the member is gone then.
pub async fn resume(node: &Arc<Node>, key: &MemberKey) -> Result<FromAgent, Report> {
    let _gate = node.members.gate(key).await;
    let member = node.members.find(key)?;
    let Some(built) = locked(&member.built).take() else {
        let text = format!("member {key} is not waiting to be resumed");
        return Err(Report::new("agent-not-built", Class::Failure, text));
    };
    match run(&member, built).await {
        Ok(()) => {
            members::follow(node, &member);
            tracing::info!(member = %key, "resumed");
            Ok(FromAgent::Done)
        }
        Err(report) => {
            members::discard(node, &member).await;
            Err(report)
        }
    }
}

async fn run(member: &Arc<Member>, built: Built) -> Result<(), Report> {
    let Built { mut engine, root } = built;
    // Before it runs: else its end could come before anybody knows whose end it is.
    let expecting = member.clone();
    blocking(move || match expecting.capsule() {
        Some(capsule) => capsule.ask(&Ask::Expect { root }).map(|_| ()),
        None => Ok(()),
    })
    .await
    .map_err(|error| error.report())?;
    let doing = "resuming";
    match engine
        .ask(&ToEngine::Resume, doing, PATIENCE)
        .await
        .map_err(|error| error.report())?
    {
        FromEngine::Resumed => Ok(()), // its end is waited for elsewhere
        _ => Err(engine.unexpected(doing).report()),
    }
}

/// A tree that nobody resumes, as when the coordinator is lost for good, is given up.
fn give_up_later(node: &Arc<Node>, member: &Arc<Member>) {
    let (patience, node) = (node.settings.resume_patience, Arc::downgrade(node));
    let member = Arc::downgrade(member);
    tokio::spawn(async move {
        tokio::time::sleep(patience).await;
        let (Some(node), Some(member)) = (node.upgrade(), member.upgrade()) else {
            return;
        };
        let _gate = node.members.gate(&member.key).await;
        let waiting = locked(&member.built).take();
        if waiting.is_some() {
            tracing::warn!(member = %member.key, "never resumed: given up");
            drop(waiting);
            members::discard(&node, &member).await;
        }
    });
}

async fn build_in(
    node: &Arc<Node>,
    member: &Arc<Member>,
    order: RestoreOrder,
    image: Image,
) -> Result<FromAgent, Report> {
    let Some(capsule) = member.capsule().cloned() else {
        return Err(Report::new(
            "agent-restore",
            Class::Failure,
            "the member has no capsule",
        ));
    };
    let streams = {
        let capsule = capsule.clone();
        blocking(move || capsule.streams())
            .await
            .map_err(|error| error.report())?
    };
    let (names, descriptors): (Vec<_>, Vec<_>) = streams.into_iter().unzip();
    let mut engine = EngineProcess::start(&node.engine_program(), &descriptors)
        .map_err(|error| error.report())?;
    drop(descriptors);
    let Image {
        body,
        page_size,
        source,
        remote,
        replica,
        fetched_bytes,
    } = image;
    let memory = body.memory.clone();
    let target = RestoreTarget {
        capsule: Some(capsule.init),
        own_network: member.own_network(),
        body,
        owner: Some(member.owner.clone()),
        substitutions: names.into_iter().zip(FIRST_SUBSTITUTION..).collect(),
        connections: order.connections,
        addresses: order.addresses,
        cgroup: capsule.cgroup().map(|path| path.display().to_string()),
    };
    let report = |error: EngineError| error.report();
    let doing = "building the tree";
    let answer = engine
        .ask(&ToEngine::Restore(Box::new(target)), doing, PATIENCE)
        .await;
    if answer.map_err(report)? != FromEngine::Ready {
        return Err(engine.unexpected(doing).report());
    }
    fill(&mut engine, page_size, memory, source).await?;
    let doing = "finishing the tree";
    let answer = engine
        .ask(&ToEngine::Filled, doing, PATIENCE)
        .await
        .map_err(report)?;
    let FromEngine::Built { root, filled_bytes } = answer else {
        return Err(engine.unexpected(doing).report());
    };
    *locked(&member.built) = Some(Built { engine, root });
    let fetched_bytes = fetched_bytes + remote.map_or(0, |remote| remote.fetched_bytes());
    Ok(FromAgent::Built {
        fetched_bytes,
        filled_bytes,
        replica,
    })
}

/// Gives the engine all pages through its ring.
async fn fill(
    engine: &mut EngineProcess,
    page_size: u64,
    memory: Vec<crcoord_common::image::MemoryEntry>,
    source: Arc<dyn ChunkSource>,
) -> Result<(), Report> {
    let doing = "filling memory";
    let (slots, mut filled) = mpsc::unbounded_channel::<Slot>();
    let (free, freed) = std::sync::mpsc::channel::<u32>();
    for slot in 0..RING_SLOTS {
        // The receiver is in this function.
        let _ = free.send(slot);
    }
    let ring = engine.ring.clone();
    let mut reading = tokio::task::spawn_blocking(move || {
        let reader = PartReader::new(&memory, page_size, &*source);
        reader.read_all(READERS, |run, bytes| {
            write_slot(&ring, &freed, &slots, run, &bytes)
        })
    });
    let mut outstanding = 0u64;
    let mut batch = Vec::new();
    let mut all = false;
    while !all || outstanding > 0 {
        tokio::select! {
            count = filled.recv_many(&mut batch, RING_SLOTS as usize), if !all => match count {
                0 => all = true,
                count => {
                    outstanding += count as u64;
                    let slots = std::mem::take(&mut batch);
                    engine.send(&ToEngine::Fill(slots)).await.map_err(|error| error.report())?;
                }
            },
            message = engine.next(doing) => match message.map_err(|error| error.report())? {
                FromEngine::Freed(slots) => {
                    let count = slots.len() as u64;
                    outstanding = outstanding
                        .checked_sub(count)
                        .ok_or_else(|| engine.unexpected(doing).report())?;
                    for slot in slots {
                        // The reader has ended: then no slot is needed.
                        let _ = free.send(slot);
                    }
                }
                _ => return Err(engine.unexpected(doing).report()),
            },
        }
    }
    match (&mut reading).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(read_failure(&error)),
        Err(error) => Err(Report::new(
            "agent-restore",
            Class::Failure,
            error.to_string(),
        )),
    }
}

fn read_failure(error: &crcoord_store::ReadError<StoreError>) -> Report {
    let text = error.to_string();
    match error {
        crcoord_store::ReadError::Image { error, .. } => {
            let mut report = error.report();
            report.message = text;
            report
        }
        crcoord_store::ReadError::Consumer(error) => error.report(),
    }
}

fn write_slot(
    ring: &Ring,
    freed: &std::sync::mpsc::Receiver<u32>,
    slots: &mpsc::UnboundedSender<Slot>,
    run: PageRun,
    bytes: &[u8],
) -> Result<(), StoreError> {
    let failed =
        |text: String| StoreError::Other(Box::new(Report::new("agent-ring", Class::Failure, text)));
    let slot = freed
        .recv()
        .map_err(|_| failed("the engine takes no more pages".into()))?;
    ring.write(slot, bytes)
        .map_err(|error| failed(error.to_string()))?;
    slots
        .send(Slot { slot, run })
        .map_err(|_| failed("the engine takes no more pages".into()))
}

/// Finds the part at the nearest source that has it whole; says of each why it did not do.
async fn find_image(node: &Arc<Node>, order: &RestoreOrder) -> Result<Image, Report> {
    let mut refusals: Vec<Report> = Vec::new();
    for source in &order.sources {
        let found = match source {
            Source::Own => in_store(node, node.store.clone(), order).await,
            Source::Shared => match &node.shared {
                Some(shared) => in_store(node, shared.clone(), order).await,
                None => Err(Report::new(
                    "agent-no-shared",
                    Class::Failure,
                    "no shared directory is set here",
                )),
            },
            Source::Partner {
                node: partner,
                address,
            } => from_partner(node, partner, *address, order).await,
        };
        match found {
            Ok(image) => return Ok(image),
            Err(report) => {
                tracing::warn!(part = %order.part, ?source, %report, "not restored from there");
                refusals.push(report);
            }
        }
    }
    Err(refusals
        .into_iter()
        .reduce(|mut first, next| {
            first.message = format!("{}; then: {}", first.message, next);
            first
        })
        .unwrap_or_else(|| {
            Report::new(
                "agent-restore-source",
                Class::NotFound,
                "no source of the image was named",
            )
        }))
}

async fn in_store(
    node: &Arc<Node>,
    store: Arc<dyn ImageStore>,
    order: &RestoreOrder,
) -> Result<Image, Report> {
    let (node, order) = (node.clone(), order.clone());
    blocking(move || {
        let part = &order.part;
        match store.part(part).map_err(|error| error.report())? {
            Some(summary) => {
                if let PartState::Damaged(error) = summary.state {
                    return Err(error.report());
                }
            }
            None => return Err(StoreError::NoPart { part: part.clone() }.report()),
        }
        let encoded = store.manifest(part).map_err(|error| error.report())?;
        let (body, page_size) = checked(&node, &order, &encoded)?;
        let source = Arc::new(PartSource::new(store, part.clone()));
        Ok(Image {
            body,
            page_size,
            source,
            remote: None,
            replica: None,
            fetched_bytes: 0,
        })
    })
    .await
}

/// Copies the part into the own store, so that this node has it from now on; where that is not
/// possible, reads it directly.
async fn from_partner(
    node: &Arc<Node>,
    partner: &NodeName,
    address: std::net::SocketAddr,
    order: &RestoreOrder,
) -> Result<Image, Report> {
    let part = order.part.clone();
    let fetched = RemoteSource::open(node, partner.as_str(), address, part.clone()).await?;
    let Fetched {
        manifest,
        record,
        source,
    } = fetched;
    let (here, order) = (node.clone(), order.clone());
    blocking(move || {
        let (body, page_size) = checked(&here, &order, &manifest)?;
        match copy(&here, &part, &body, page_size, &manifest, &record, &source) {
            Ok(()) => Ok(Image {
                body,
                page_size,
                source: Arc::new(PartSource::new(here.store.clone(), part)),
                remote: None,
                replica: Some(Replica::Node(here.settings.node.clone())),
                fetched_bytes: source.fetched_bytes(),
            }),
            Err(error) if is_ours(&error) => {
                tracing::warn!(%part, %error, "not kept here; read from the partner directly");
                Ok(Image {
                    body,
                    page_size,
                    source: source.clone(),
                    remote: Some(source),
                    replica: None,
                    fetched_bytes: 0,
                })
            }
            Err(error) => Err(error.report()),
        }
    })
    .await
}

/// True where our own store is the reason: then the image itself may be fine.
fn is_ours(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Full { .. }
            | StoreError::Io { .. }
            | StoreError::Exists { .. }
            | StoreError::ReadOnly { .. }
    )
}

fn copy(
    node: &Node,
    part: &PartKey,
    body: &ManifestBody,
    page_size: u64,
    manifest: &[u8],
    record: &[u8],
    source: &RemoteSource,
) -> Result<(), StoreError> {
    node.store.abort(part)?;
    let staged = node.store.stage(part)?;
    PartReader::new(&body.memory, page_size, source).copy_to(&*staged, READERS)?;
    staged.seal(manifest)?;
    if !record.is_empty() {
        node.store.commit(part, record)?;
    }
    Ok(())
}

/// Checks that the manifest is the one that was committed, authentic, and usable on this node.
fn checked(
    node: &Node,
    order: &RestoreOrder,
    encoded: &[u8],
) -> Result<(ManifestBody, u64), Report> {
    let refused = |code: &str, text: String| {
        Report::new(code, Class::Failure, text).path(order.part.to_string())
    };
    if Manifest::digest(encoded) != order.manifest {
        let text = "the manifest is not the one that was committed".to_owned();
        return Err(refused("agent-restore-digest", text));
    }
    let page_size = u32::try_from(rustix::param::page_size()).unwrap_or(u32::MAX);
    let manifest = Manifest::decode(encoded, &node.key, page_size).map_err(|error| {
        let report = refused("agent-restore-manifest", error.to_string());
        match error {
            ManifestError::Architecture { .. } | ManifestError::PageSize { .. } => Report {
                class: Class::Obstacle,
                ..report
            }
            .remedy("restart on nodes of the kind the checkpoint was taken on"),
            ManifestError::TooNew { .. } => Report {
                class: Class::Obstacle,
                ..report
            }
            .remedy("update crcoord on this node"),
            ManifestError::Forged | ManifestError::Unkeyed => {
                report.remedy("check that every node has the cluster's own image.key")
            }
            _ => report,
        }
    })?;
    if manifest.body.part.as_ref() != Some(&order.part) {
        return Err(refused(
            "agent-restore-part",
            "the manifest is of another part".into(),
        ));
    }
    Ok((manifest.body, page_size.into()))
}
