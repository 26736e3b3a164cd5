//! An engine process: `crcoord engine serve`, one per tree being captured or restored. It speaks over
//! descriptor 3 and shares pages over the ring in descriptor 4; its end is an event, never ours.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StandardStream;
use std::sync::Arc;
use std::time::Duration;

use crcoord_common::image::WINDOW_BYTES;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::engine::{FromEngine, RING_SLOTS, ToEngine};
use crcoord_common::wire::frame::FrameError;
use crcoord_kernel::process_control::{Spawn, signal_process};
use crcoord_kernel::ring::Ring;
use crcoord_transport::{FrameReader, FrameWriter};
use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::capsule::handle::wait_readable;

/// Largest message of the engine's socket, in bytes: a manifest body is one message.
pub const ENGINE_MESSAGE_LIMIT: u32 = 1 << 30;
/// Number of the engine's first descriptor beyond socket and ring.
pub const FIRST_SUBSTITUTION: i32 = 5;
/// How long an engine whose agent lets go may take to give its tree back before it is killed.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It could not be started.
    #[error("the engine could not be started: {0}")]
    Start(#[from] io::Error),
    /// It ended, or was killed.
    #[error("the engine process {pid} ended while {doing}")]
    Gone {
        /// Its pid.
        pid: i32,
        /// What it was asked for.
        doing: &'static str,
    },
    /// It broke the protocol.
    #[error("the engine process {pid} cannot be understood: {source}")]
    Talk {
        /// Its pid.
        pid: i32,
        /// What is wrong.
        source: FrameError,
    },
    /// It did not answer.
    #[error("the engine process {pid} gave no answer within {} s while {doing}", after.as_secs())]
    Silent {
        /// Its pid.
        pid: i32,
        /// What it was asked for.
        doing: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// It answered something that does not fit.
    #[error("the engine process {pid} gave an answer that does not fit while {doing}")]
    Unexpected {
        /// Its pid.
        pid: i32,
        /// What it was asked for.
        doing: &'static str,
    },
    /// It says why it cannot be done.
    #[error("{}", first(.0))]
    Refused(Vec<Report>),
}

fn first(reports: &[Report]) -> String {
    match reports {
        [] => "the engine failed without a reason".to_owned(),
        [only] => only.to_string(),
        [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
    }
}

impl EngineError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            EngineError::Refused(reports) => match reports.as_slice() {
                [] => Report::new("agent-engine", Class::Failure, text),
                [only] => only.clone(),
                [first, rest @ ..] => {
                    let mut report = first.clone();
                    let rest: Vec<_> = rest.iter().map(ToString::to_string).collect();
                    report.message = format!("{}; also: {}", report.message, rest.join("; "));
                    report
                }
            },
            EngineError::Silent { .. } => Report::new("agent-engine-silent", Class::TimedOut, text),
            EngineError::Gone { .. } => Report::new("agent-engine-gone", Class::Failure, text)
                .remedy("look for the engine's last words in the agent's log"),
            EngineError::Start(error) => {
                Report::new("agent-engine-start", Class::Failure, text).errno(error.raw_os_error())
            }
            _ => Report::new("agent-engine", Class::Failure, text),
        }
    }
}

/// A running engine. Dropped, it is let go: it sees the end of its socket and gives its tree back.
#[derive(Debug)]
pub struct EngineProcess {
    /// Its pid.
    pub pid: i32,
    /// The pages' ring.
    pub ring: Arc<Ring>,
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
    pidfd: Option<OwnedFd>,
}

impl EngineProcess {
    /// Starts one; `substitutions` become its descriptors from [`FIRST_SUBSTITUTION`] on. Call on
    /// the runtime.
    ///
    /// # Errors
    /// [`EngineError::Start`].
    pub fn start(program: &str, substitutions: &[OwnedFd]) -> Result<Self, EngineError> {
        let (ours, theirs) = StandardStream::pair()?;
        ours.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(ours)?.into_split();
        let ring = Ring::create(RING_SLOTS, WINDOW_BYTES as usize)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let log = io::stderr();
        let mut descriptors = vec![
            null.as_fd(),
            null.as_fd(),
            log.as_fd(),
            theirs.as_fd(),
            ring.as_fd(),
        ];
        descriptors.extend(substitutions.iter().map(AsFd::as_fd));
        // What the site set for diagnosis; nothing else of the agent's environment.
        let environment: Vec<_> = ["RUST_BACKTRACE", "RUST_LOG", "CRCOORD_LOG"]
            .into_iter()
            .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)))
            .collect();
        let spawned = Spawn::new(program, &["crcoord", "engine", "serve"], &environment)?
            .descriptors(descriptors)
            .new_session()
            .start()?;
        Ok(EngineProcess {
            pid: spawned.pid,
            ring: Arc::new(ring),
            reader: FrameReader::with_limit(read, ENGINE_MESSAGE_LIMIT),
            writer: FrameWriter::with_limit(write, ENGINE_MESSAGE_LIMIT),
            pidfd: Some(spawned.pidfd),
        })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`EngineError::Gone`].
    pub async fn send(&mut self, message: &ToEngine) -> Result<(), EngineError> {
        let gone = EngineError::Gone {
            pid: self.pid,
            doing: "being asked",
        };
        self.writer.send(message).await.map_err(|_| gone)
    }

    /// The next message; a refusal is an error. Cancel-safe.
    ///
    /// # Errors
    /// [`EngineError`].
    pub async fn next(&mut self, doing: &'static str) -> Result<FromEngine, EngineError> {
        match self.reader.recv().await {
            Ok(Some(FromEngine::Failed(reports))) => Err(EngineError::Refused(reports)),
            Ok(Some(message)) => Ok(message),
            Ok(None) | Err(FrameError::Io(_) | FrameError::Truncated) => Err(EngineError::Gone {
                pid: self.pid,
                doing,
            }),
            Err(source) => Err(EngineError::Talk {
                pid: self.pid,
                source,
            }),
        }
    }

    /// Asks and waits for the one answer.
    ///
    /// # Errors
    /// [`EngineError`].
    pub async fn ask(
        &mut self,
        message: &ToEngine,
        doing: &'static str,
        patience: Duration,
    ) -> Result<FromEngine, EngineError> {
        self.send(message).await?;
        match tokio::time::timeout(patience, self.next(doing)).await {
            Ok(answer) => answer,
            Err(_) => Err(EngineError::Silent {
                pid: self.pid,
                doing,
                after: patience,
            }),
        }
    }

    /// The error of an answer that does not fit.
    pub fn unexpected(&self, doing: &'static str) -> EngineError {
        EngineError::Unexpected {
            pid: self.pid,
            doing,
        }
    }

    /// Asks it to give its tree back and waits for its end, by force after a while: however it ends,
    /// the tree runs on (or, half built, is gone).
    pub async fn abort(mut self) {
        // An engine that is gone already has released its tree by that.
        let _ = self.send(&ToEngine::Abort).await;
        let end = async {
            while self
                .next("aborting")
                .await
                .is_ok_and(|message| message != FromEngine::Done)
            {}
        };
        let _ = tokio::time::timeout(FAREWELL, end).await;
        self.ended().await;
    }

    /// Lets go of it and waits until it is gone.
    pub async fn ended(mut self) {
        let pidfd = self.pidfd.take();
        drop(self); // the engine sees the end of its socket
        if let Some(pidfd) = pidfd {
            // A failure means that the runtime is ending, and this process with it.
            let _ = tokio::task::spawn_blocking(move || let_go(&pidfd)).await;
        }
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            // Not on the runtime, which may be ending. Without a thread it stays a zombie at worst.
            let _ = std::thread::Builder::new()
                .name("engine-end".to_owned())
                .spawn(move || let_go(&pidfd));
        }
    }
}

fn let_go(pidfd: &OwnedFd) {
    if !wait_readable(pidfd, FAREWELL)
        && let Err(error) = signal_process(pidfd, Signal::KILL.as_raw())
    {
        tracing::warn!(%error, "an engine that does not end could not be killed");
    }
    if let Err(error) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        tracing::warn!(%error, "an engine could not be waited for");
    }
}
