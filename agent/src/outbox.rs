//! What an agent has to tell its coordinator: queued here, sent by `link` while there is a link.
//!
//! Answers and events are few and small and are kept until they can be sent. Output of programs is
//! bounded: while it cannot be sent the capsule's pipe fills and the program waits.

use crcoord_common::ids::{MemberKey, RequestId, Term};
use crcoord_common::report::Report;
use crcoord_common::wire::control::{Frame, FromAgent};
use tokio::sync::mpsc;

/// Output messages that may wait, each at most 64 KiB.
const OUTPUT_WAITING: usize = 16;

/// The filling side; clones share the queue.
#[derive(Clone, Debug)]
pub struct Outbox {
    messages: mpsc::UnboundedSender<Frame<FromAgent>>,
    output: mpsc::Sender<Frame<FromAgent>>,
}

/// The emptying side.
#[derive(Debug)]
pub struct Outgoing {
    messages: mpsc::UnboundedReceiver<Frame<FromAgent>>,
    output: mpsc::Receiver<Frame<FromAgent>>,
}

/// A new queue.
pub fn outbox() -> (Outbox, Outgoing) {
    let (messages, messages_out) = mpsc::unbounded_channel();
    let (output, output_out) = mpsc::channel(OUTPUT_WAITING);
    (
        Outbox { messages, output },
        Outgoing {
            messages: messages_out,
            output: output_out,
        },
    )
}

impl Outbox {
    /// Queues a message that answers nothing.
    pub fn event(&self, body: FromAgent) {
        // Fails only when the daemon is ending.
        let _ = self.messages.send(Frame {
            request: RequestId(0),
            term: Term(0),
            body,
        });
    }

    /// Queues output; waits while too much is queued. False when the daemon is ending.
    pub async fn output(&self, key: MemberKey, stream: u8, bytes: Vec<u8>) -> bool {
        let body = FromAgent::Output { key, stream, bytes };
        self.output
            .send(Frame {
                request: RequestId(0),
                term: Term(0),
                body,
            })
            .await
            .is_ok()
    }

    /// The way to answer one request.
    pub fn reply(&self, request: RequestId, term: Term) -> Reply {
        Reply {
            outbox: self.clone(),
            request,
            term,
        }
    }
}

impl Outgoing {
    /// The next message; answers and events go before output. Its term is 0 for events, which the
    /// sender fills in. Cancel-safe.
    pub async fn next(&mut self) -> Option<Frame<FromAgent>> {
        tokio::select! {
            biased;
            message = self.messages.recv() => message,
            Some(output) = self.output.recv() => Some(output),
        }
    }
}

/// Answers one request, under its id and the term of the coordinator that asked.
#[derive(Clone, Debug)]
pub struct Reply {
    outbox: Outbox,
    request: RequestId,
    term: Term,
}

impl Reply {
    /// Queues an answer.
    pub fn send(&self, body: FromAgent) {
        let _ = self.outbox.messages.send(Frame {
            request: self.request,
            term: self.term,
            body,
        });
    }

    /// Queues a failure.
    pub fn fail(&self, report: Report) {
        self.send(FromAgent::Failed(report));
    }

    /// Queues what became of it.
    pub fn result(&self, result: Result<FromAgent, Report>) {
        match result {
            Ok(body) => self.send(body),
            Err(report) => self.fail(report),
        }
    }
}
