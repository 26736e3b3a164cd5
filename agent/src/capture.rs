//! The member's side of one epoch: preflight, hold, capture, release, then streaming and the seal.
//!
//! ```text
//! Preflight -> Hold -> Capture -> Release -> (stream) -> Sealed
//!              |<--- lease ------->|
//! ```
//! One task owns the session and its engine and reads one queue. While the member is held a lease
//! runs; when it ends without renewal the engine is told to let go, the coordinator hears HoldLost,
//! and nothing of this epoch is done any more. Abort works in every phase.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crcoord_common::ids::{Epoch, PartKey};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{CaptureOptions, CaptureSummary, CopyTarget, FromAgent};
use crcoord_common::wire::engine::{CaptureTarget, FromEngine, ToEngine};
use crcoord_store::{ImageStore, PartState};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::engine_process::{EngineError, EngineProcess};
use crate::members::Member;
use crate::node::{Node, blocking, locked};
use crate::outbox::Reply;
use crate::stream;

/// How long an engine may look a tree over, the job running.
const PREFLIGHT_PATIENCE: Duration = Duration::from_secs(120);
/// How long freezing, capturing and releasing may take; a held member's lease ends much earlier.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long an engine waits for the next step of an epoch that its coordinator forgot.
const FORGOTTEN: Duration = Duration::from_secs(900);

/// What a session is asked.
enum Ask {
    Hold {
        lease: Duration,
        reply: Reply,
    },
    Renew {
        lease: Duration,
        reply: Reply,
    },
    Capture {
        reply: Reply,
    },
    Release {
        copies: Vec<CopyTarget>,
        reply: Reply,
    },
    Abort {
        done: oneshot::Sender<()>,
    },
}

/// An epoch of one member, as the dispatcher holds it.
#[derive(Debug)]
pub struct Session {
    /// The epoch.
    pub epoch: Epoch,
    asks: mpsc::UnboundedSender<Ask>,
    active: Arc<AtomicBool>,
}

impl Session {
    /// Begins an epoch with its preflight, which is the first answer.
    pub fn begin(
        node: &Arc<Node>,
        member: &Arc<Member>,
        epoch: Epoch,
        options: CaptureOptions,
        reply: Reply,
    ) -> Self {
        let (asks, queue) = mpsc::unbounded_channel();
        let active = Arc::new(AtomicBool::new(true));
        let key = &member.key;
        let part = PartKey {
            job: key.job.clone(),
            epoch,
            member: key.member,
        };
        let run = Run {
            node: node.clone(),
            member: member.clone(),
            part,
            queue,
            lease: None,
            held: false,
            pending: Some(reply),
            at_work: mpsc::channel(1),
        };
        let running = active.clone();
        tokio::spawn(async move { run.run(options, &running).await });
        Session {
            epoch,
            asks,
            active,
        }
    }

    /// True until it has ended, well or not.
    pub fn active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    /// Locks and freezes.
    pub fn hold(&self, lease_ms: u64, reply: Reply) {
        self.tell(Ask::Hold {
            lease: Duration::from_millis(lease_ms),
            reply,
        });
    }

    /// Renews the lease of the hold.
    pub fn renew(&self, lease_ms: u64, reply: Reply) {
        self.tell(Ask::Renew {
            lease: Duration::from_millis(lease_ms),
            reply,
        });
    }

    /// Takes the state.
    pub fn capture(&self, reply: Reply) {
        self.tell(Ask::Capture { reply });
    }

    /// Lets the member run and streams.
    pub fn release(&self, copies: Vec<CopyTarget>, reply: Reply) {
        self.tell(Ask::Release { copies, reply });
    }

    /// Drops everything; returns when the member runs and the engine is gone.
    pub async fn abort(&self) {
        abort(&self.asks).await;
    }

    /// The same without borrowing the session.
    pub fn aborting(&self) -> impl Future<Output = ()> + Send + use<> {
        let asks = self.asks.clone();
        async move { abort(&asks).await }
    }

    fn tell(&self, ask: Ask) {
        if let Err(mpsc::error::SendError(ask)) = self.asks.send(ask) {
            refuse(ask, "the epoch has ended on this member");
        }
    }
}

async fn abort(asks: &mpsc::UnboundedSender<Ask>) {
    let (done, aborted) = oneshot::channel();
    if asks.send(Ask::Abort { done }).is_ok() {
        // An error means that the session has ended by itself.
        let _ = aborted.await;
    }
}

/// Removes what an unfinished epoch left in the stores; committed parts are never touched.
pub async fn drop_part(node: &Arc<Node>, part: PartKey) {
    let node = node.clone();
    blocking(move || {
        let stores = std::iter::once(&node.store).chain(&node.shared);
        for store in stores {
            if let Err(error) = drop_from(&**store, &part) {
                tracing::warn!(%part, %error, "an unfinished part was not removed");
            }
        }
    })
    .await;
}

fn drop_from(store: &dyn ImageStore, part: &PartKey) -> Result<(), crcoord_store::StoreError> {
    store.abort(part)?;
    let sealed = store
        .part(part)?
        .is_some_and(|part| part.state == PartState::Sealed);
    match sealed {
        true => store.remove(part).map(|_| ()),
        false => Ok(()),
    }
}

/// Why a session ends before its seal.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The coordinator wants it.
    Abort(Option<oneshot::Sender<()>>),
    /// The lease of the hold ran out.
    LeaseOver,
    /// The engine failed or died.
    Engine(EngineError),
    /// Something else failed.
    Failed(Report),
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Stop::Engine(error)
    }
}

/// The session's task.
pub(crate) struct Run {
    pub(crate) node: Arc<Node>,
    pub(crate) member: Arc<Member>,
    pub(crate) part: PartKey,
    queue: mpsc::UnboundedReceiver<Ask>,
    lease: Option<Instant>,
    held: bool,
    pending: Option<Reply>,
    /// Held by whatever writes for this epoch off the runtime.
    at_work: (stream::AtWork, mpsc::Receiver<()>),
}

impl Run {
    async fn run(mut self, options: CaptureOptions, active: &AtomicBool) {
        let mut engine = None;
        let outcome = self.epoch(&mut engine, options).await;
        let mut abort = None;
        let report = match outcome {
            Ok(()) => None,
            Err(Stop::Abort(done)) => {
                abort = done;
                Some(self.aborted())
            }
            Err(Stop::LeaseOver) => Some(
                Report::new(
                    "agent-hold-lease",
                    Class::Aborted,
                    "the lease of the hold ran out",
                )
                .remedy("check the network between coordinator and agent"),
            ),
            Err(Stop::Engine(error)) => Some(error.report()),
            Err(Stop::Failed(report)) => Some(report),
        };
        if let Some(engine) = engine {
            match report.is_some() {
                true => engine.abort().await,
                false => engine.ended().await,
            }
        }
        active.store(false, Ordering::SeqCst);
        if let Some(report) = report {
            let report = self.node.here(report);
            tracing::warn!(member = %self.member.key, epoch = %self.part.epoch, %report, "epoch ended");
            // A seal that was under way when the epoch ended must not come after the removal.
            let (at_work, mut ended) = self.at_work;
            drop(at_work);
            let _ = ended.recv().await;
            drop_part(&self.node, self.part.clone()).await;
            if self.held && abort.is_none() {
                self.node.outbox.event(FromAgent::HoldLost {
                    key: self.member.key.clone(),
                    epoch: self.part.epoch,
                    report: report.clone(),
                });
            }
            if let Some(reply) = self.pending.take() {
                reply.fail(report);
            }
        }
        if let Some(done) = abort {
            let _ = done.send(()); // the asker may have gone
        }
        self.queue.close();
        while let Some(ask) = self.queue.recv().await {
            refuse(ask, "the epoch has ended on this member");
        }
    }

    fn aborted(&self) -> Report {
        Report::new(
            "agent-epoch-aborted",
            Class::Aborted,
            "the epoch was aborted",
        )
    }

    async fn epoch(
        &mut self,
        slot: &mut Option<EngineProcess>,
        options: CaptureOptions,
    ) -> Result<(), Stop> {
        let target = self.target(options).await?;
        let engine = slot.insert(EngineProcess::start(&self.node.engine_program(), &[])?);
        self.preflight(engine, target).await?;

        let (lease, reply) = match self.next(engine, "waiting for the hold").await? {
            Ask::Hold { lease, reply } => (lease, reply),
            other => return Err(out_of_order(other)),
        };
        // From the receipt, not from the moment it is in force.
        self.lease = Some(Instant::now() + lease);
        self.pending = Some(reply);
        engine.send(&ToEngine::Hold).await?;
        let FromEngine::Held { freeze_us } = self.answer(engine, "freezing", PATIENCE).await?
        else {
            return Err(engine.unexpected("freezing").into());
        };
        self.held = true;
        self.reply(FromAgent::Held { freeze_us });

        let reply = match self.next(engine, "waiting for the capture").await? {
            Ask::Capture { reply } => reply,
            other => return Err(out_of_order(other)),
        };
        self.pending = Some(reply);
        engine.send(&ToEngine::Capture).await?;
        let answer = self.answer(engine, "capturing", PATIENCE).await?;
        let FromEngine::Captured(summary) = answer else {
            return Err(engine.unexpected("capturing").into());
        };
        self.reply(FromAgent::Captured(summary.clone()));

        let (copies, reply) = match self.next(engine, "waiting for the release").await? {
            Ask::Release { copies, reply } => (copies, reply),
            other => return Err(out_of_order(other)),
        };
        self.pending = Some(reply);
        self.release(engine, summary, copies).await
    }

    async fn target(&self, options: CaptureOptions) -> Result<CaptureTarget, Stop> {
        let member = self.member.clone();
        let scope = member.scope().ok_or_else(|| {
            let text = format!("member {} has ended", member.key);
            Stop::Failed(Report::new("agent-member-ended", Class::NotFound, text))
        })?;
        let own_network = member.own_network();
        let left_out = blocking(move || member.left_out())
            .await
            .map_err(Stop::Failed)?;
        Ok(CaptureTarget {
            scope,
            own_network,
            left_out,
            options,
        })
    }

    async fn preflight(
        &mut self,
        engine: &mut EngineProcess,
        target: CaptureTarget,
    ) -> Result<(), Stop> {
        engine.send(&ToEngine::Preflight(target)).await?;
        let answer = self
            .answer(engine, "looking the tree over", PREFLIGHT_PATIENCE)
            .await?;
        let FromEngine::Preflighted(mut preflight) = answer else {
            return Err(engine.unexpected("looking the tree over").into());
        };
        let node = self.node.clone();
        let free = blocking(move || node.free_bytes()).await;
        let wanted = self.node.settings.min_free_bytes;
        if free < wanted {
            preflight
                .findings
                .push(crate::bulk_server::no_room(free, wanted));
        }
        for finding in &mut preflight.findings {
            *finding = self.node.here(finding.clone());
        }
        self.reply(FromAgent::Preflighted(preflight));
        Ok(())
    }

    async fn release(
        &mut self,
        engine: &mut EngineProcess,
        summary: CaptureSummary,
        copies: Vec<CopyTarget>,
    ) -> Result<(), Stop> {
        engine.send(&ToEngine::Release).await?;
        let answer = self.answer(engine, "releasing", PATIENCE).await?;
        let FromEngine::Released { frozen_us } = answer else {
            return Err(engine.unexpected("releasing").into());
        };
        (self.lease, self.held) = (None, false);
        if let Some(reply) = &self.pending {
            reply.send(FromAgent::Released { frozen_us });
        }
        let commit = {
            let streaming = stream::stream(
                self.node.clone(),
                self.at_work.0.clone(),
                self.member.key.clone(),
                self.part.clone(),
                engine,
                summary,
                frozen_us,
                copies,
            );
            tokio::pin!(streaming);
            loop {
                tokio::select! {
                    outcome = &mut streaming => break outcome?,
                    ask = self.queue.recv() => match ask {
                        Some(Ask::Abort { done }) => return Err(Stop::Abort(Some(done))),
                        None => return Err(Stop::Abort(None)),
                        Some(other) => refuse(other, "the member runs and is being streamed"),
                    },
                }
            }
        };
        self.reply(FromAgent::Sealed { commit });
        Ok(())
    }

    /// The next request for a new step. Renewals are served; the engine's death and the lease's end
    /// are noticed.
    async fn next(&mut self, engine: &mut EngineProcess, doing: &'static str) -> Result<Ask, Stop> {
        let forgotten = Instant::now() + FORGOTTEN;
        loop {
            tokio::select! {
                ask = self.queue.recv() => match ask {
                    Some(Ask::Renew { lease, reply }) => self.renew(lease, &reply),
                    Some(Ask::Abort { done }) => return Err(Stop::Abort(Some(done))),
                    Some(ask) => return Ok(ask),
                    None => return Err(Stop::Abort(None)),
                },
                message = engine.next(doing) => {
                    message?;
                    return Err(engine.unexpected(doing).into());
                }
                () = until(self.lease) => return Err(Stop::LeaseOver),
                () = tokio::time::sleep_until(forgotten) => return Err(Stop::Abort(None)),
            }
        }
    }

    /// The engine's answer to the last request.
    async fn answer(
        &mut self,
        engine: &mut EngineProcess,
        doing: &'static str,
        patience: Duration,
    ) -> Result<FromEngine, Stop> {
        let end = Instant::now() + patience;
        loop {
            tokio::select! {
                message = engine.next(doing) => return Ok(message?),
                ask = self.queue.recv() => match ask {
                    Some(Ask::Renew { lease, reply }) => self.renew(lease, &reply),
                    Some(Ask::Abort { done }) => return Err(Stop::Abort(Some(done))),
                    Some(other) => refuse(other, "the step before is not done yet"),
                    None => return Err(Stop::Abort(None)),
                },
                () = until(self.lease) => return Err(Stop::LeaseOver),
                () = tokio::time::sleep_until(end) => {
                    let pid = engine.pid;
                    return Err(EngineError::Silent { pid, doing, after: patience }.into());
                }
            }
        }
    }

    fn renew(&mut self, lease: Duration, reply: &Reply) {
        match self.lease {
            Some(_) => {
                self.lease = Some(Instant::now() + lease);
                reply.send(FromAgent::Done);
            }
            None => reply.fail(Report::new(
                "agent-hold-none",
                Class::Failure,
                "there is no hold whose lease could be renewed",
            )),
        }
    }

    fn reply(&mut self, body: FromAgent) {
        if let Some(reply) = self.pending.take() {
            reply.send(body);
        }
    }
}

fn out_of_order(ask: Ask) -> Stop {
    let why = "the coordinator asked for a step out of order";
    refuse(ask, why);
    Stop::Failed(Report::new("agent-epoch-order", Class::Failure, why))
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn refuse(ask: Ask, why: &str) {
    let reply = match ask {
        Ask::Hold { reply, .. }
        | Ask::Renew { reply, .. }
        | Ask::Capture { reply }
        | Ask::Release { reply, .. } => reply,
        Ask::Abort { done } => {
            let _ = done.send(()); // the asker may have gone
            return;
        }
    };
    reply.fail(Report::new("agent-epoch-step", Class::Aborted, why));
}

/// The session of this epoch, if the member has it.
///
/// # Errors
/// A report that names the epoch.
pub fn with_session<T>(
    member: &Member,
    epoch: Epoch,
    work: impl FnOnce(&Session) -> T,
) -> Result<T, Report> {
    match &*locked(&member.session) {
        Some(session) if session.epoch == epoch => Ok(work(session)),
        _ => Err(Report::new(
            "agent-epoch-unknown",
            Class::Aborted,
            format!("epoch {epoch} is not going on for member {}", member.key),
        )),
    }
}
