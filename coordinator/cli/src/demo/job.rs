//! A run of the solver in the demo's cluster: started as a job, watched, followed to its end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crcoord_common::ids::{JobId, NodeName};
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::member::{Command, ExitStatus, NetworkMode, Stdio};

use super::display::Display;
use super::error::DemoError;
use crate::client::{Client, unexpected};
use crate::commands::run::groups_of_caller;
use crate::commands::show::ended_text;
use crate::failure::Failure;

/// Everything that is waited for must happen within this time.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// The job's opt-in: cut off from the coordinator for this long, a member ends itself.
const RUN_LEASE: Duration = Duration::from_secs(3);

/// What is computed, by which program, and where its files go.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) program: PathBuf,
    /// Seen by all nodes; every job gets a directory in it.
    pub(super) directory: PathBuf,
    /// Cells along an edge of the field.
    pub(super) size: u32,
    pub(super) steps: u64,
}

/// A job that was started, with the connection over which its output and its end are told.
pub(super) struct Job {
    pub(super) id: JobId,
    client: Client,
    steps: u64,
    /// Where rank 0 writes how far it is.
    progress: PathBuf,
    /// Where rank 0 writes the final field.
    field: PathBuf,
    /// What the job wrote to standard error.
    errors: String,
    /// Steps done when they last grew, and when that was.
    last: (u64, Instant),
}

impl Job {
    /// Starts the solver as a job and waits until all its members run.
    pub(super) async fn start(
        socket: &Path,
        problem: &Problem,
        id: &str,
        nodes: &[NodeName],
        network: NetworkMode,
        display: &mut Display,
    ) -> Result<Self, Failure> {
        let id: JobId = id
            .parse()
            .map_err(|error| Failure::internal("job", &error))?;
        let directory = problem.directory.join(format!("job-{id}"));
        std::fs::create_dir(&directory)
            .map_err(DemoError::io(format!("making {}", directory.display())))?;
        let arguments = [
            &problem.program.display().to_string(),
            "demo-part",
            "heat",
            "--directory",
            &directory.display().to_string(),
            "--size",
            &problem.size.to_string(),
            "--steps",
            &problem.steps.to_string(),
        ];
        let request = Request::Run {
            job: id.clone(),
            nodes: nodes.to_vec(),
            command: Command {
                arguments: arguments.map(str::to_owned).to_vec(),
                environment: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
                directory: directory.display().to_string(),
                umask: 0o022,
            },
            groups: groups_of_caller()?,
            stdio: Stdio::Caller,
            network,
            run_lease_ms: Some(RUN_LEASE.as_millis() as u64),
            attach: true,
        };
        let mut client = Client::send(socket, &request).await?;
        match client.next().await? {
            Event::JobStarted { placements, .. } => display.placed(&placements),
            other => return Err(unexpected(&other)),
        }
        Ok(Job {
            progress: directory.join("progress"),
            field: directory.join("field"),
            steps: problem.steps,
            errors: String::new(),
            last: (0, Instant::now()),
            id,
            client,
        })
    }

    /// The same job in its next life, whose end this connection tells.
    pub(super) fn resumed(self, client: Client) -> Self {
        let last = (0, Instant::now());
        Job {
            client,
            last,
            ..self
        }
    }

    /// Waits until so many steps are done; how many are done then.
    pub(super) async fn until(&mut self, step: u64, display: &mut Display) -> Result<u64, Failure> {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        loop {
            tokio::select! {
                event = self.client.next() => {
                    if self.hear(event?)? {
                        return Ok(self.steps);
                    }
                }
                _ = ticks.tick() => {
                    let done = self.look(display)?;
                    if done >= step {
                        return Ok(done);
                    }
                }
            }
        }
    }

    /// Waits until the job has ended well; its final field.
    pub(super) async fn follow(mut self, display: &mut Display) -> Result<PathBuf, Failure> {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                event = self.client.next() => {
                    if self.hear(event?)? {
                        return Ok(self.field);
                    }
                }
                _ = ticks.tick() => drop(self.look(display)?),
            }
        }
    }

    /// True when the job has ended well; an error when a rank ended otherwise, as the other ranks
    /// wait for it for ever.
    fn hear(&mut self, event: Event) -> Result<bool, Failure> {
        match event {
            Event::Output {
                stream: 2, bytes, ..
            } => self.errors.push_str(&String::from_utf8_lossy(&bytes)),
            Event::MemberEnded { member, status } if status != ExitStatus::Exited(0) => {
                return Err(self.failed(&format!("rank {member}: {}", ended_text(status))));
            }
            Event::JobEnded { statuses } => {
                let bad = statuses
                    .iter()
                    .find(|(_, how)| *how != ExitStatus::Exited(0));
                return match bad {
                    None => Ok(true),
                    Some((member, how)) => {
                        Err(self.failed(&format!("rank {member}: {}", ended_text(*how))))
                    }
                };
            }
            _ => {}
        }
        Ok(false)
    }

    /// How many steps are done; an error when they do not grow any more.
    fn look(&mut self, display: &Display) -> Result<u64, Failure> {
        let done = steps_done(&self.progress);
        display.steps(&self.id, done, self.steps);
        if done != self.last.0 {
            self.last = (done, Instant::now());
        }
        match self.last.1.elapsed() > PATIENCE {
            true => Err(self.failed(&format!("no progress since step {done}"))),
            false => Ok(done),
        }
    }

    fn failed(&self, what: &str) -> Failure {
        let text = format!("{what}; it wrote: {:?}", self.errors.trim());
        Failure::internal(&format!("job {}", self.id), &text)
    }
}

/// What rank 0 last said of itself; 0 before it said anything.
fn steps_done(progress: &Path) -> u64 {
    let text = std::fs::read_to_string(progress).unwrap_or_default();
    let step = text.trim().strip_prefix("step ");
    step.and_then(|step| step.parse().ok()).unwrap_or(0)
}
