//! The nodes: who is connected, over which session, and when it was last heard.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crcoord_common::ids::NodeName;

use crate::action::{Hello, SessionId};
use crate::time::Millis;

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// The present connection.
    pub(crate) session: Option<SessionId>,
    /// Where other agents reach it.
    pub(crate) bulk: SocketAddr,
    pub(crate) heard: Millis,
    pub(crate) free_bytes: u64,
}

/// All nodes seen in this term.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Nodes(BTreeMap<NodeName, Node>);

impl Nodes {
    /// Takes a connection; the one before, if there was one, is returned.
    pub(crate) fn connect(
        &mut self,
        now: Millis,
        name: &NodeName,
        session: SessionId,
        hello: &Hello,
    ) -> Option<SessionId> {
        let node = Node {
            session: Some(session),
            bulk: hello.bulk,
            heard: now,
            free_bytes: hello.free_bytes,
        };
        self.0
            .insert(name.clone(), node)
            .and_then(|old| old.session)
    }

    /// Forgets the connection; false when it was not the present one.
    pub(crate) fn disconnect(&mut self, name: &NodeName, session: SessionId) -> bool {
        match self.0.get_mut(name) {
            Some(node) if node.session == Some(session) => {
                node.session = None;
                true
            }
            _ => false,
        }
    }

    /// True when that is the node's present connection.
    pub(crate) fn is_present(&self, name: &NodeName, session: SessionId) -> bool {
        self.session(name) == Some(session)
    }

    pub(crate) fn heard(&mut self, now: Millis, name: &NodeName) {
        if let Some(node) = self.0.get_mut(name) {
            node.heard = now;
        }
    }

    pub(crate) fn set_free_bytes(&mut self, name: &NodeName, free_bytes: u64) {
        if let Some(node) = self.0.get_mut(name) {
            node.free_bytes = free_bytes;
        }
    }

    pub(crate) fn session(&self, name: &NodeName) -> Option<SessionId> {
        self.0.get(name).and_then(|node| node.session)
    }

    pub(crate) fn is_connected(&self, name: &NodeName) -> bool {
        self.session(name).is_some()
    }

    pub(crate) fn bulk(&self, name: &NodeName) -> Option<SocketAddr> {
        self.0
            .get(name)
            .filter(|node| node.session.is_some())
            .map(|node| node.bulk)
    }

    pub(crate) fn get(&self, name: &NodeName) -> Option<&Node> {
        self.0.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&NodeName, &Node)> {
        self.0.iter()
    }

    pub(crate) fn connected(&self) -> impl Iterator<Item = &NodeName> {
        self.0
            .iter()
            .filter(|(_, node)| node.session.is_some())
            .map(|(name, _)| name)
    }

    /// Connected nodes that were silent for too long.
    pub(crate) fn silent(&self, now: Millis, timeout_ms: u64) -> Vec<(NodeName, SessionId)> {
        let silent = self
            .0
            .iter()
            .filter(|(_, node)| now >= node.heard.after(timeout_ms));
        silent
            .filter_map(|(name, node)| Some((name.clone(), node.session?)))
            .collect()
    }

    /// When the next connected node has been silent for too long.
    pub(crate) fn next_deadline(&self, timeout_ms: u64) -> Option<Millis> {
        let connected = self.0.values().filter(|node| node.session.is_some());
        connected.map(|node| node.heard.after(timeout_ms)).min()
    }
}
