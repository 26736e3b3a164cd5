//! `Outbox`: what may be done now, and what may be done only once a journal record is durable.
//!
//! ```text
//! persist(record) -> n       record goes to `now`
//! send(action)               -> `now`, unless something for the same destination waits: then behind it
//! send_after(n, action)      -> `waiting` until persisted(n)
//! ```

use std::collections::{BTreeMap, VecDeque};

use crate::action::{Action, Destination};
use crate::record::Record;

/// Number of a journal record in this life of the coordinator, counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(pub u64);

/// The two queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Outbox {
    now: VecDeque<Action>,
    /// In the order of their sequence numbers.
    waiting: VecDeque<(Sequence, Action)>,
    /// What the last waiting action for a destination waits for.
    behind: BTreeMap<Destination, Sequence>,
    last: Sequence,
    persisted: Sequence,
}

impl Outbox {
    /// Hands a record to the journal and tells its number.
    pub(crate) fn persist(&mut self, record: Record) -> Sequence {
        self.last = Sequence(self.last.0 + 1);
        self.now.push_back(Action::Persist {
            sequence: self.last,
            record: Box::new(record),
        });
        self.last
    }

    /// The newest record handed to the journal.
    pub(crate) fn last(&self) -> Sequence {
        self.last
    }

    /// True once that record is durable.
    pub(crate) fn is_persisted(&self, sequence: Sequence) -> bool {
        sequence <= self.persisted
    }

    /// Does it as soon as nothing older for the same destination waits.
    pub(crate) fn send(&mut self, action: Action) {
        self.send_after(Sequence(0), action);
    }

    /// Does it at once, before what waits: for messages that depend on no record, such as the
    /// renewal of a lease.
    pub(crate) fn send_urgent(&mut self, action: Action) {
        self.now.push_back(action);
    }

    /// Does it once record `sequence` is durable, and not before what waits for the same
    /// destination.
    pub(crate) fn send_after(&mut self, sequence: Sequence, action: Action) {
        let destination = action.destination();
        let behind = self.behind.get(&destination).copied();
        let sequence = behind.unwrap_or_default().max(sequence);
        if self.is_persisted(sequence) {
            self.now.push_back(action);
            return;
        }
        let place = self
            .waiting
            .partition_point(|(waiting, _)| *waiting <= sequence);
        self.waiting.insert(place, (sequence, action));
        if destination != Destination::Log {
            self.behind.insert(destination, sequence);
        }
    }

    /// Records up to this one are durable.
    pub(crate) fn persisted(&mut self, sequence: Sequence) {
        // A number that was never given out confirms nothing.
        if sequence <= self.persisted || sequence > self.last {
            return;
        }
        self.persisted = sequence;
        self.behind.retain(|_, waiting| *waiting > sequence);
        while self
            .waiting
            .front()
            .is_some_and(|(waiting, _)| *waiting <= sequence)
        {
            if let Some((_, action)) = self.waiting.pop_front() {
                self.now.push_back(action);
            }
        }
    }

    pub(crate) fn poll(&mut self) -> Option<Action> {
        self.now.pop_front()
    }
}
