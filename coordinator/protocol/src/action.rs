//! What the machine is told and what it asks for.

use std::net::SocketAddr;

use crcoord_common::ids::{NodeName, Term};
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::control::{Frame, FromAgent, MemberState, PartState, ToAgent};
use crcoord_common::wire::member::Owner;

use crate::outbox::Sequence;
use crate::record::Record;

/// A connected command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

/// One connection of an agent: never used again, so that what an older connection still delivers is
/// known as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What an agent said first, its name and version already checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// Where other agents reach it.
    pub bulk: SocketAddr,
    /// Newest term it has obeyed.
    pub term: Term,
    /// Members there.
    pub members: Vec<MemberState>,
    /// Parts in its store.
    pub parts: Vec<PartState>,
    /// Free bytes of its store.
    pub free_bytes: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// All records up to this one are durable.
    Persisted(Sequence),
    /// An agent connected.
    Connected {
        /// Its node, as its certificate says.
        node: NodeName,
        /// This connection.
        session: SessionId,
        /// What it said.
        hello: Hello,
    },
    /// A connection ended.
    Disconnected {
        /// The node.
        node: NodeName,
        /// Which connection.
        session: SessionId,
    },
    /// A message of an agent.
    Message {
        /// The node.
        node: NodeName,
        /// Over which connection.
        session: SessionId,
        /// The message.
        frame: Frame<FromAgent>,
    },
    /// A command's request, its permission already checked.
    Asked {
        /// Who.
        client: ClientId,
        /// Credentials of the caller.
        caller: Owner,
        /// True for root and operators.
        privileged: bool,
        /// What.
        request: Request,
    },
    /// A command went away.
    Left {
        /// Which.
        client: ClientId,
    },
    /// The wall clock: seconds since 1970-01-01 UTC at this moment. Given at start and whenever it
    /// was set.
    Wall {
        /// The seconds.
        unix: u64,
    },
    /// The daemon is asked to stop: open epochs are aborted, so that no job waits for its lease.
    Stop,
    /// A deadline may have passed.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Append to the journal, in this order, then hand in [`Input::Persisted`].
    Persist {
        /// Its number.
        sequence: Sequence,
        /// The record.
        record: Box<Record>,
    },
    /// Send to an agent.
    Send {
        /// The node.
        node: NodeName,
        /// Over this connection only.
        session: SessionId,
        /// The message.
        frame: Box<Frame<ToAgent>>,
    },
    /// Close an agent's connection.
    Drop {
        /// The node.
        node: NodeName,
        /// Which connection.
        session: SessionId,
        /// Why.
        reason: String,
    },
    /// Tell a command.
    Tell {
        /// Which.
        client: ClientId,
        /// What.
        event: Box<Event>,
        /// Nothing follows.
        last: bool,
    },
    /// Write to the log.
    Log {
        /// True for what an administrator should look at.
        warning: bool,
        /// One line.
        line: String,
    },
}

/// Whom an action concerns: actions for the same one keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Destination {
    Journal,
    Agent(SessionId),
    Client(ClientId),
    Log,
}

impl Action {
    pub(crate) fn destination(&self) -> Destination {
        match self {
            Action::Persist { .. } => Destination::Journal,
            Action::Send { session, .. } | Action::Drop { session, .. } => {
                Destination::Agent(*session)
            }
            Action::Tell { client, .. } => Destination::Client(*client),
            Action::Log { .. } => Destination::Log,
        }
    }
}
