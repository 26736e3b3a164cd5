//! The requests that agents have not answered yet. An answer that belongs to none of them is stale.

use std::collections::BTreeMap;

use crcoord_common::ids::{Epoch, MemberKey, NodeName, RequestId};
use crcoord_common::wire::control::FromAgent;

use crate::action::{ClientId, SessionId};

/// What an answer is to be taken for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    /// Start or Adopt.
    Start(MemberKey),
    /// Preflight, Hold, Capture or Release.
    Epoch(MemberKey, Epoch),
    Renew(MemberKey, Epoch),
    /// Abort of an epoch that failed.
    CleanUp(MemberKey, Epoch),
    Kill(MemberKey),
    Build(MemberKey),
    Resume(MemberKey),
    /// Commit or Retire: nothing depends on the answer.
    Store,
    /// Preflight for a question, not for an epoch.
    Survey(MemberKey, Epoch),
    /// Probe of a node.
    Check(ClientId),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Request {
    node: NodeName,
    session: SessionId,
    purpose: Purpose,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Requests {
    open: BTreeMap<RequestId, Request>,
    last: RequestId,
}

impl Requests {
    /// A number for a message, remembered when an answer is expected.
    pub(crate) fn open(
        &mut self,
        node: &NodeName,
        session: SessionId,
        purpose: Option<Purpose>,
    ) -> RequestId {
        self.last = self.last.next();
        if let Some(purpose) = purpose {
            let request = Request {
                node: node.clone(),
                session,
                purpose,
            };
            self.open.insert(self.last, request);
        }
        self.last
    }

    /// What the answer is for; `None` when it is stale or from somebody else. A release is answered
    /// twice, so `Released` leaves it open.
    pub(crate) fn answered(
        &mut self,
        node: &NodeName,
        session: SessionId,
        id: RequestId,
        answer: &FromAgent,
    ) -> Option<Purpose> {
        let request = self.open.get(&id)?;
        if request.node != *node || request.session != session {
            return None;
        }
        if matches!(answer, FromAgent::Released { .. }) {
            return Some(request.purpose.clone());
        }
        self.open.remove(&id).map(|request| request.purpose)
    }

    /// Forgets all that a lost connection can no longer answer, and tells it.
    pub(crate) fn lost(&mut self, session: SessionId) -> Vec<Purpose> {
        let lost = |request: &Request| request.session == session;
        let ids: Vec<RequestId> = self
            .open
            .iter()
            .filter(|(_, request)| lost(request))
            .map(|(id, _)| *id)
            .collect();
        ids.into_iter()
            .filter_map(|id| self.open.remove(&id))
            .map(|request| request.purpose)
            .collect()
    }

    /// Forgets the orders of an epoch that is decided.
    pub(crate) fn close_epoch(&mut self, job: &crcoord_common::ids::JobKey, closed: Epoch) {
        self.open.retain(|_, request| match &request.purpose {
            Purpose::Epoch(key, epoch)
            | Purpose::Renew(key, epoch)
            | Purpose::Survey(key, epoch) => key.job != *job || *epoch != closed,
            _ => true,
        });
    }

    pub(crate) fn is_killing(&self, key: &MemberKey) -> bool {
        let kill = |request: &Request| matches!(&request.purpose, Purpose::Kill(of) if of == key);
        self.open.values().any(kill)
    }
}
