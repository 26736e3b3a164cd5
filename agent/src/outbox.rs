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
    /// A member's end, and how many messages of output may have been queued before it.
    held: Option<(Frame<FromAgent>, usize)>,
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
            held: None,
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
    /// The next message; answers and events go before output, but no member's end before its last
    /// words. Its term is 0 for events, which the sender fills in. Cancel-safe.
    pub async fn next(&mut self) -> Option<Frame<FromAgent>> {
        if self.held.is_none() {
            let message = tokio::select! {
                biased;
                message = self.messages.recv() => message,
                Some(output) = self.output.recv() => return Some(output),
            };
            match message {
                Some(end) if matches!(end.body, FromAgent::Ended { .. }) => {
                    self.held = Some((end, self.output.len()));
                }
                other => return other,
            }
        }
        let (end, before) = self.held.take()?;
        match before.checked_sub(1).zip(self.output.try_recv().ok()) {
            Some((before, output)) => {
                self.held = Some((end, before));
                Some(output)
            }
            None => Some(end),
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

#[cfg(test)]
mod tests {
    use crcoord_common::ids::{Incarnation, JobKey, MemberId};
    use crcoord_common::wire::member::ExitStatus;

    use super::*;

    #[tokio::test]
    async fn a_members_end_follows_its_last_words_and_answers_overtake_both() {
        let (outbox, mut outgoing) = outbox();
        let key = MemberKey {
            job: JobKey {
                cluster: "c".parse().unwrap(),
                id: "1".parse().unwrap(),
                submitted: 2,
            },
            incarnation: Incarnation(3),
            member: MemberId(4),
        };
        for byte in 0..3 {
            assert!(outbox.output(key.clone(), 1, vec![byte]).await);
        }
        outbox.reply(RequestId(1), Term(1)).send(FromAgent::Done);
        let status = ExitStatus::Exited(0);
        outbox.event(FromAgent::Ended { key, status });
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.push(outgoing.next().await.unwrap().body);
        }
        assert!(matches!(seen[0], FromAgent::Done));
        let output = |body: &FromAgent| matches!(body, FromAgent::Output { .. });
        assert!(seen[1..4].iter().all(output), "{seen:?}");
        assert!(matches!(seen[4], FromAgent::Ended { .. }));
    }
}
