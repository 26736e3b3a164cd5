//! The engine process: one tree, one agent, one conversation over descriptor 3, pages in the ring
//! behind descriptor 4. When the agent goes away the tree runs on, or what is half built ends.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use crcoord_common::image::{PageRun, WINDOW_BYTES};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::MESSAGE_LIMIT;
use crcoord_common::wire::control::Preflight;
use crcoord_common::wire::engine::{FromEngine, RING_SLOTS, Slot, ToEngine};
use crcoord_common::wire::frame::{self, FrameError};
use crcoord_kernel::process_control::inherited_descriptor;
use crcoord_kernel::ring::Ring;
use crcoord_kernel::sys::page_size;

use crate::capture::{self, Captured, Held, Streaming};
use crate::error::EngineError;
use crate::pages::PageSink;
use crate::resources::mappings::ContentHashes;
use crate::restore::{Building, Built};

/// Largest message with a manifest body in it, in bytes: as large as a manifest may be.
pub const BODY_LIMIT: u32 = 1 << 30;
const SOCKET: i32 = 3;
const RING: i32 = 4;
/// Filled slots that are told of together.
const BATCH: usize = 16;

/// Why an engine process ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its descriptors are not what an agent gives.
    #[error("the engine was not started by an agent: {0}")]
    Descriptors(std::io::Error),
    /// The conversation broke.
    #[error("the agent's socket failed: {0}")]
    Frame(#[from] FrameError),
    /// A message that does not fit the state.
    #[error("unexpected message {0} from the agent")]
    Unexpected(String),
}

/// Runs the conversation to its end.
pub fn main() -> Result<(), ServeError> {
    let socket = inherited_descriptor(SOCKET).map_err(ServeError::Descriptors)?;
    let ring = inherited_descriptor(RING)
        .and_then(|memory| Ring::open(memory, RING_SLOTS, WINDOW_BYTES as usize))
        .map_err(ServeError::Descriptors)?;
    let mut agent = Agent {
        socket: UnixStream::from(socket),
        ring,
    };
    match agent.receive()? {
        None => Ok(()),
        Some(ToEngine::Preflight(target)) => Capturing::new(target).run(&mut agent),
        Some(ToEngine::Restore(target)) => restore(target, &mut agent),
        Some(other) => Err(unexpected(&other)),
    }
}

fn unexpected(message: &ToEngine) -> ServeError {
    let text = format!("{message:?}");
    ServeError::Unexpected(text.split(['(', '{', ' ']).next().unwrap_or("").to_owned())
}

struct Agent {
    socket: UnixStream,
    ring: Ring,
}

impl Agent {
    fn receive(&mut self) -> Result<Option<ToEngine>, FrameError> {
        frame::read(&mut self.socket, BODY_LIMIT)
    }

    fn send(&mut self, message: &FromEngine) -> Result<(), FrameError> {
        let limit = match message {
            FromEngine::Body(_) => BODY_LIMIT,
            _ => MESSAGE_LIMIT,
        };
        frame::write(&mut self.socket, message, limit)
    }

    fn fail(&mut self, error: EngineError) -> Result<(), FrameError> {
        self.send(&FromEngine::Failed(error.0))
    }
}

/// Where a capture stands.
// One value per process: its size is of no consequence.
#[allow(clippy::large_enum_variant)]
enum Stage {
    Idle(ContentHashes),
    Held(Held),
    Captured(Captured),
    Over,
}

struct Capturing {
    target: crcoord_common::wire::engine::CaptureTarget,
    stage: Stage,
}

impl Capturing {
    fn new(target: crcoord_common::wire::engine::CaptureTarget) -> Self {
        Capturing {
            target,
            stage: Stage::Idle(ContentHashes::default()),
        }
    }

    fn run(mut self, agent: &mut Agent) -> Result<(), ServeError> {
        self.preflight(agent)?;
        while let Some(message) = agent.receive()? {
            let stage = std::mem::replace(&mut self.stage, Stage::Over);
            match (message, stage) {
                (ToEngine::Preflight(target), Stage::Idle(_)) => {
                    self = Capturing::new(target);
                    self.preflight(agent)?;
                }
                (ToEngine::Hold, Stage::Idle(hashes)) => self.hold(hashes, agent)?,
                (ToEngine::Capture, Stage::Held(held)) => self.capture(held, agent)?,
                (ToEngine::Release, Stage::Captured(captured)) => {
                    return release(captured, agent);
                }
                (ToEngine::Abort, stage) => {
                    drop(stage);
                    agent.send(&FromEngine::Done)?;
                    return Ok(());
                }
                (message, _) => return Err(unexpected(&message)),
            }
            if matches!(self.stage, Stage::Over) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn preflight(&mut self, agent: &mut Agent) -> Result<(), FrameError> {
        let mut hashes = ContentHashes::default();
        let found =
            capture::preflight(&self.target, &mut hashes).unwrap_or_else(|error| Preflight {
                findings: error.0,
                ..Preflight::default()
            });
        self.stage = Stage::Idle(hashes);
        agent.send(&FromEngine::Preflighted(found))
    }

    fn hold(&mut self, hashes: ContentHashes, agent: &mut Agent) -> Result<(), FrameError> {
        match Held::hold(self.target.clone(), hashes) {
            Ok(held) => {
                let freeze_us = held.elapsed().as_micros() as u64;
                self.stage = Stage::Held(held);
                agent.send(&FromEngine::Held { freeze_us })
            }
            Err(error) => agent.fail(error),
        }
    }

    fn capture(&mut self, held: Held, agent: &mut Agent) -> Result<(), FrameError> {
        match held.capture(false) {
            Ok(captured) => {
                let summary = captured.summary().clone();
                self.stage = Stage::Captured(captured);
                agent.send(&FromEngine::Captured(summary))
            }
            Err(error) => agent.fail(error),
        }
    }
}

fn release(captured: Captured, agent: &mut Agent) -> Result<(), ServeError> {
    let (mut streaming, frozen) = captured.release();
    agent.send(&FromEngine::Released {
        frozen_us: frozen.as_micros() as u64,
    })?;
    match stream(&mut streaming, agent) {
        Ok(body) => agent.send(&FromEngine::Body(Box::new(body)))?,
        Err(error) => agent.fail(error)?,
    }
    Ok(())
}

fn stream(
    streaming: &mut Streaming,
    agent: &mut Agent,
) -> Result<crcoord_common::image::ManifestBody, EngineError> {
    let mut sink = RingSink {
        free: (0..agent.ring.slots()).collect(),
        filled: Vec::with_capacity(BATCH),
        agent,
    };
    let body = streaming.stream(&mut sink)?;
    sink.flush()?;
    Ok(body)
}

/// Puts pages into the ring and waits for free slots.
struct RingSink<'a> {
    agent: &'a mut Agent,
    free: VecDeque<u32>,
    filled: Vec<Slot>,
}

fn lost(error: &dyn std::fmt::Display) -> Report {
    Report::new(
        "engine-agent-lost",
        Class::Failure,
        format!("the agent went away: {error}"),
    )
}

impl RingSink<'_> {
    fn flush(&mut self) -> Result<(), Report> {
        if !self.filled.is_empty() {
            let pages = FromEngine::Pages(std::mem::take(&mut self.filled));
            self.agent.send(&pages).map_err(|error| lost(&error))?;
        }
        Ok(())
    }

    fn slot(&mut self) -> Result<u32, Report> {
        loop {
            if let Some(slot) = self.free.pop_front() {
                return Ok(slot);
            }
            self.flush()?;
            match self.agent.receive().map_err(|error| lost(&error))? {
                Some(ToEngine::Free(slots)) => self.free.extend(slots),
                Some(ToEngine::Abort) | None => {
                    return Err(Report::new(
                        "engine-aborted",
                        Class::Aborted,
                        "the agent aborted the epoch",
                    ));
                }
                Some(other) => return Err(lost(&unexpected(&other))),
            }
        }
    }
}

impl PageSink for RingSink<'_> {
    fn put(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), Report> {
        let slot = self.slot()?;
        self.agent
            .ring
            .write(slot, bytes)
            .map_err(|error| lost(&error))?;
        self.filled.push(Slot { slot, run });
        if self.filled.len() == BATCH {
            self.flush()?;
        }
        Ok(())
    }
}

fn restore(
    target: Box<crcoord_common::wire::engine::RestoreTarget>,
    agent: &mut Agent,
) -> Result<(), ServeError> {
    let mut building = match Building::begin(target) {
        Ok(building) => building,
        Err(error) => return Ok(agent.fail(error)?),
    };
    agent.send(&FromEngine::Ready)?;
    let built = loop {
        match agent.receive()? {
            None | Some(ToEngine::Abort) => return Ok(()),
            Some(ToEngine::Fill(slots)) => match fill(&mut building, &slots, &agent.ring) {
                Ok(()) => {
                    let freed = slots.iter().map(|slot| slot.slot).collect();
                    agent.send(&FromEngine::Freed(freed))?;
                }
                Err(error) => return Ok(agent.fail(error)?),
            },
            Some(ToEngine::Filled) => match building.finish() {
                Ok(built) => break built,
                Err(error) => return Ok(agent.fail(error)?),
            },
            Some(other) => return Err(unexpected(&other)),
        }
    };
    wait_for_resume(built, agent)
}

fn wait_for_resume(built: Built, agent: &mut Agent) -> Result<(), ServeError> {
    agent.send(&FromEngine::Built {
        root: built.root(),
        filled_bytes: built.filled(),
    })?;
    match agent.receive()? {
        Some(ToEngine::Resume) => match built.resume() {
            Ok(()) => Ok(agent.send(&FromEngine::Resumed)?),
            Err(error) => Ok(agent.fail(error)?),
        },
        None | Some(ToEngine::Abort) => Ok(()),
        Some(other) => Err(unexpected(&other)),
    }
}

fn fill(building: &mut Building, slots: &[Slot], ring: &Ring) -> Result<(), EngineError> {
    for slot in slots {
        let bytes = ring
            .read(slot.slot, slot.run.bytes(page_size()) as usize)
            .map_err(|error| crate::error::failure("reading the ring", &error))?;
        building.fill(&slot.run, &bytes)?;
    }
    Ok(())
}
