//! The driver: the one task that owns the machine. It reads one queue, hands everything to the
//! machine and carries out what that asks for. It decides nothing but permissions.

use std::time::Duration;

use crcoord_common::ids::NodeName;
use crcoord_common::wire::client::{Event, Request};
use crcoord_protocol::{Action, ClientId, Coordinator, Hello, Input, Millis, SessionId};
use crcoord_store::JournalError;
use crcoord_transport::{Connection, FrameWriter, Sender};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;

use crate::agents::Agents;
use crate::caller::Caller;
use crate::clients::Clients;
use crate::clock::{self, Clock};
use crate::error::CoordinatorError;
use crate::journal::Writer;
use crate::permissions;

/// Messages taken from the queue before their actions are carried out: so that many records share
/// one append.
const BATCH: usize = 256;

/// How long a stop waits for aborts to become durable and known.
const STOP_TIME: Duration = Duration::from_secs(2);

/// What the other tasks tell the driver.
#[derive(Debug)]
pub(crate) enum Message {
    /// For the machine as it is.
    Input(Input),
    /// An agent said Hello.
    AgentConnected {
        node: NodeName,
        session: SessionId,
        hello: Hello,
        connection: Connection,
        sender: Sender,
    },
    /// A command asks.
    Asked {
        client: ClientId,
        caller: Caller,
        request: Box<Request>,
        writer: FrameWriter<OwnedWriteHalf>,
    },
    /// A command went away.
    Left(ClientId),
    /// Nothing can be decided any more.
    JournalFailed(JournalError),
}

/// The driver's task.
#[derive(Debug)]
pub(crate) struct Driver {
    machine: Coordinator,
    clock: Clock,
    /// Difference of the wall clock to the machine's, in seconds, as the machine knows it.
    wall: u64,
    /// Dropped before the journal, whose thread sends to it.
    queue: mpsc::Receiver<Message>,
    journal: Writer,
    agents: Agents,
    clients: Clients,
    operators: Vec<u32>,
}

impl Driver {
    pub(crate) fn new(
        mut machine: Coordinator,
        queue: mpsc::Receiver<Message>,
        journal: Writer,
        operators: Vec<u32>,
    ) -> Self {
        let clock = Clock::start();
        let unix = clock::unix();
        machine.begin(clock.now(), unix);
        Driver {
            machine,
            clock,
            wall: unix,
            queue,
            journal,
            agents: Agents::default(),
            clients: Clients::default(),
            operators,
        }
    }

    /// Runs until `shutdown` or a failure of the journal.
    pub(crate) async fn run(
        mut self,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), CoordinatorError> {
        tokio::pin!(shutdown);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            self.carry_out();
            tokio::select! {
                count = self.queue.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return Err(CoordinatorError::Ended("queue of the driver"));
                    }
                    self.take(&mut batch)?;
                }
                () = sleep_until(&self.clock, self.machine.next_deadline()) => {
                    self.watch_wall();
                    self.tell(Input::Tick);
                }
                () = &mut shutdown => return self.stop().await,
            }
        }
    }

    fn take(&mut self, batch: &mut Vec<Message>) -> Result<(), CoordinatorError> {
        self.watch_wall();
        for message in batch.drain(..) {
            match message {
                Message::Input(input) => {
                    if let Input::Disconnected { session, .. } = &input {
                        self.agents.remove(*session);
                    }
                    self.tell(input);
                }
                Message::AgentConnected {
                    node,
                    session,
                    hello,
                    connection,
                    sender,
                } => {
                    self.agents.add(session, connection, sender);
                    self.tell(Input::Connected {
                        node,
                        session,
                        hello,
                    });
                }
                Message::Asked {
                    client,
                    caller,
                    request,
                    writer,
                } => {
                    self.clients.add(client, writer);
                    self.ask(client, &caller, *request);
                }
                Message::Left(client) => {
                    self.clients.remove(client);
                    self.tell(Input::Left { client });
                }
                Message::JournalFailed(error) => {
                    tracing::error!(%error, "the journal failed, nothing can be decided any more");
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Decides whether the caller may, and asks the machine.
    fn ask(&mut self, client: ClientId, caller: &Caller, request: Request) {
        let privileged = caller.uid == 0 || self.operators.contains(&caller.uid);
        let deed = permissions::deed(&request);
        let owner = deed.job.and_then(|job| self.machine.job_owner(job));
        let decision = permissions::decide(caller.uid, privileged, &deed, owner);
        if deed.changes {
            let job = deed.job.map(ToString::to_string).unwrap_or_default();
            let (uid, pid, verb, allowed) = (caller.uid, caller.pid, deed.verb, decision.is_ok());
            let word = permissions::confirmed_dead(&request);
            tracing::info!(target: "audit", uid, pid, verb, job, allowed, confirmed_dead = word);
        }
        if let Err(report) = decision {
            return self
                .clients
                .tell(client, Event::Failed(vec![*report]), true);
        }
        let groups: &[u32] = match &request {
            Request::Run { groups, .. } => groups,
            _ => &[],
        };
        let owner = caller.owner(groups);
        let request = match request {
            Request::Run {
                job,
                nodes,
                command,
                stdio,
                network,
                run_lease_ms,
                attach,
                ..
            } => Request::Run {
                job,
                nodes,
                command,
                groups: owner.groups.clone(),
                stdio,
                network,
                run_lease_ms,
                attach,
            },
            other => other,
        };
        self.tell(Input::Asked {
            client,
            caller: owner,
            privileged,
            request,
        });
    }

    fn tell(&mut self, input: Input) {
        self.machine.handle(self.clock.now(), input);
    }

    /// Tells the machine when the wall clock was set.
    fn watch_wall(&mut self) {
        let known = self.wall + self.clock.now().0 / 1000;
        let unix = clock::unix();
        if known.abs_diff(unix) > 1 {
            tracing::info!(known, unix, "the wall clock was set");
            self.wall = unix.saturating_sub(self.clock.now().0 / 1000);
            self.tell(Input::Wall { unix });
        }
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Persist { sequence, record } => self.journal.append(sequence, *record),
                Action::Send { session, frame, .. } => self.agents.send(session, *frame),
                Action::Drop {
                    session, reason, ..
                } => self.agents.drop_session(session, &reason),
                Action::Tell {
                    client,
                    event,
                    last,
                } => self.clients.tell(client, *event, last),
                Action::Log {
                    warning: true,
                    line,
                } => tracing::warn!("{line}"),
                Action::Log { line, .. } => tracing::info!("{line}"),
            }
        }
    }

    /// Aborts open epochs, so that no job stays frozen until its lease ends, and lets that become
    /// durable and known.
    async fn stop(mut self) -> Result<(), CoordinatorError> {
        self.tell(Input::Stop);
        self.carry_out();
        let deadline = tokio::time::Instant::now() + STOP_TIME;
        let mut batch = Vec::with_capacity(BATCH);
        while !self.machine.is_quiet() {
            match tokio::time::timeout_at(deadline, self.queue.recv_many(&mut batch, BATCH)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => self.take(&mut batch)?,
            }
            self.carry_out();
        }
        let told = async {
            self.agents.finish().await;
            self.clients.finish().await;
        };
        if tokio::time::timeout_at(deadline, told).await.is_err() {
            tracing::debug!("some agents or commands may not have heard of the stop");
        }
        Ok(())
    }
}

async fn sleep_until(clock: &Clock, deadline: Option<Millis>) {
    match deadline {
        Some(deadline) => {
            tokio::time::sleep(Duration::from_millis(deadline.since(clock.now()))).await;
        }
        None => std::future::pending().await,
    }
}
