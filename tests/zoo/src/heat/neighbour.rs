//! The exchange of edge rows, within a rank and between ranks.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Condvar, Mutex, PoisonError};

use super::block::{Block, Edge, to_bytes, to_numbers};
use crate::{Explain, Outcome, ensure};

/// Where the rows beyond an edge come from.
pub(super) enum Neighbour<'a> {
    /// The edge of the field: fixed, no exchange.
    Border,
    /// Another thread of this rank.
    Local {
        out: &'a Mailbox,
        incoming: &'a Mailbox,
    },
    /// Another rank. Of the two ends one sends first, so that two full socket buffers cannot face each other.
    Remote { link: TcpStream, sends_first: bool },
}

impl Neighbour<'_> {
    pub(super) fn exchange(&mut self, block: &mut Block, edge: Edge) -> Outcome {
        let row = match self {
            Neighbour::Border => return Ok(()),
            Neighbour::Local { out, incoming } => {
                out.put(block.edge(edge).to_vec());
                incoming.take()?
            }
            Neighbour::Remote { link, sends_first } => {
                if *sends_first {
                    link.write_all(&to_bytes(block.edge(edge)))
                        .explain("send")?;
                }
                let mut bytes = vec![0; block.width * 8];
                link.read_exact(&mut bytes).explain("receive")?;
                if !*sends_first {
                    link.write_all(&to_bytes(block.edge(edge)))
                        .explain("send")?;
                }
                to_numbers(&bytes)
            }
        };
        block.set_halo(edge, &row);
        Ok(())
    }
}

/// Rows from one thread to its neighbour. At most two are in it, as both sides go step by step.
#[derive(Default)]
pub(super) struct Mailbox {
    pub(super) state: Mutex<(VecDeque<Vec<f64>>, bool)>,
    pub(super) changed: Condvar,
}

impl Mailbox {
    pub(super) fn put(&self, row: Vec<f64>) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .push_back(row);
        self.changed.notify_one();
    }

    pub(super) fn take(&self) -> Outcome<Vec<f64>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(row) = state.0.pop_front() {
                return Ok(row);
            }
            ensure!(!state.1, "the neighbouring thread gave up");
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }
}
