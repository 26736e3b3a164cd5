//! `Core`: what every job needs of its surroundings: settings, time, nodes, requests, the outbox.

use crcoord_common::ids::{Epoch, JobKey, MemberKey, NodeName, RequestId};
use crcoord_common::report::Report;
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{Frame, ToAgent};

use crate::action::{Action, ClientId};
use crate::leadership::Leadership;
use crate::nodes::Nodes;
use crate::outbox::{Outbox, Sequence};
use crate::record::Record;
use crate::requests::{Purpose, Requests};
use crate::settings::Settings;
use crate::time::Millis;

/// The surroundings.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Core {
    pub(crate) settings: Settings,
    pub(crate) now: Millis,
    wall: (Millis, u64),
    pub(crate) leadership: Leadership,
    /// Record of the present term: nothing is sent before it is durable.
    pub(crate) term_record: Sequence,
    pub(crate) nodes: Nodes,
    pub(crate) requests: Requests,
    pub(crate) outbox: Outbox,
}

impl Core {
    pub(crate) fn new(settings: Settings) -> Self {
        Core {
            settings,
            now: Millis(0),
            wall: (Millis(0), 0),
            leadership: Leadership::default(),
            term_record: Sequence(0),
            nodes: Nodes::default(),
            requests: Requests::default(),
            outbox: Outbox::default(),
        }
    }

    /// Time goes on, never back.
    pub(crate) fn at(&mut self, now: Millis) {
        self.now = self.now.max(now);
    }

    pub(crate) fn set_wall(&mut self, unix: u64) {
        self.wall = (self.now, unix);
    }

    /// Seconds since 1970-01-01 UTC at present.
    pub(crate) fn unix(&self) -> u64 {
        self.unix_at(self.now)
    }

    /// Seconds since 1970-01-01 UTC at that time.
    pub(crate) fn unix_at(&self, time: Millis) -> u64 {
        let (at, unix) = self.wall;
        (unix + time.since(at) / 1000).saturating_sub(at.since(time) / 1000)
    }

    pub(crate) fn persist(&mut self, record: Record) -> Sequence {
        self.outbox.persist(record)
    }

    /// Sends to an agent once `after` is durable; false when it is not connected.
    pub(crate) fn order(
        &mut self,
        after: Sequence,
        node: &NodeName,
        purpose: Option<Purpose>,
        body: ToAgent,
    ) -> bool {
        let Some(session) = self.nodes.session(node) else {
            return false;
        };
        let request = self.requests.open(node, session, purpose);
        let action = self.frame(node, request, body);
        if let Some(action) = action {
            self.outbox.send_after(after.max(self.term_record), action);
        }
        true
    }

    /// Sends what depends on no record, before all that waits; false when it is not connected.
    pub(crate) fn order_urgent(
        &mut self,
        node: &NodeName,
        purpose: Option<Purpose>,
        body: ToAgent,
    ) -> bool {
        let Some(session) = self.nodes.session(node) else {
            return false;
        };
        let request = self.requests.open(node, session, purpose);
        self.send_urgent(node, request, body);
        true
    }

    /// Answers an agent's own message under its number.
    pub(crate) fn answer(&mut self, node: &NodeName, request: RequestId, body: ToAgent) {
        self.send_urgent(node, request, body);
    }

    fn send_urgent(&mut self, node: &NodeName, request: RequestId, body: ToAgent) {
        let Some(action) = self.frame(node, request, body) else {
            return;
        };
        if self.outbox.is_persisted(self.term_record) {
            self.outbox.send_urgent(action);
        } else {
            self.outbox.send_after(self.term_record, action);
        }
    }

    fn frame(&self, node: &NodeName, request: RequestId, body: ToAgent) -> Option<Action> {
        Some(Action::Send {
            node: node.clone(),
            session: self.nodes.session(node)?,
            frame: Box::new(Frame {
                request,
                term: self.leadership.term(),
                body,
            }),
        })
    }

    /// Ends a member's tree, unless that is asked for already; false when its node is not connected.
    pub(crate) fn kill(&mut self, after: Sequence, node: &NodeName, key: MemberKey) -> bool {
        if self.requests.is_killing(&key) {
            return true;
        }
        let purpose = Purpose::Kill(key.clone());
        self.order(after, node, Some(purpose), ToAgent::Kill { key })
    }

    /// Tells a command, if there is still one.
    pub(crate) fn tell(&mut self, client: Option<ClientId>, event: Event, last: bool) {
        self.tell_after(Sequence(0), client, event, last);
    }

    /// Tells a command once `after` is durable.
    pub(crate) fn tell_after(
        &mut self,
        after: Sequence,
        client: Option<ClientId>,
        event: Event,
        last: bool,
    ) {
        if let Some(client) = client {
            let event = Box::new(event);
            let action = Action::Tell {
                client,
                event,
                last,
            };
            self.outbox.send_after(after, action);
        }
    }

    /// Tells a command that it failed, once `after` is durable.
    pub(crate) fn fail(&mut self, after: Sequence, client: Option<ClientId>, reasons: Vec<Report>) {
        self.tell_after(after, client, Event::Failed(reasons), true);
    }

    pub(crate) fn log(&mut self, line: String) {
        self.outbox.send(Action::Log {
            warning: false,
            line,
        });
    }

    pub(crate) fn warn(&mut self, line: String) {
        self.outbox.send(Action::Log {
            warning: true,
            line,
        });
    }

    /// Forgets what was asked about an epoch.
    pub(crate) fn close_epoch(&mut self, job: &JobKey, epoch: Epoch) {
        self.requests.close_epoch(job, epoch);
    }
}
