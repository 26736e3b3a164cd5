//! The commands that are connected: each has a writer task, and a bound on what waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crcoord_common::wire::client::Event;
use crcoord_protocol::ClientId;
use crcoord_transport::FrameWriter;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

/// A command that reads so slowly that more than this waits for it is let go: the coordinator's
/// memory is not the place for a job's output.
const WAITING_LIMIT: usize = 8 << 20;

/// What an event without output counts for.
const EVENT_BYTES: usize = 1 << 10;

/// All connected commands.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    connected: BTreeMap<ClientId, Client>,
    writers: JoinSet<()>,
}

#[derive(Debug)]
struct Client {
    events: mpsc::UnboundedSender<(Event, bool)>,
    waiting: Arc<AtomicUsize>,
    writer: AbortHandle,
}

impl Clients {
    /// Takes a command; its events go out by a task of their own.
    pub(crate) fn add(&mut self, id: ClientId, writer: FrameWriter<OwnedWriteHalf>) {
        let (events, queue) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        while self.writers.try_join_next().is_some() {}
        let writer = self.writers.spawn(write(writer, queue, waiting.clone()));
        let client = Client {
            events,
            waiting,
            writer,
        };
        self.connected.insert(id, client);
    }

    /// Sends an event; after the last one the connection is closed.
    pub(crate) fn tell(&mut self, id: ClientId, event: Event, last: bool) {
        let Some(client) = self.connected.get(&id) else {
            return;
        };
        let bytes = size(&event);
        let waiting = client.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let lost = client.events.send((event, last)).is_err();
        if waiting > WAITING_LIMIT {
            tracing::warn!(client = id.0, waiting, "command reads too slowly, let go");
            // What waits for it is given back at once; the end of its stream tells it.
            client.writer.abort();
        }
        if last || lost || waiting > WAITING_LIMIT {
            // After the last event the task writes what it has and ends.
            self.connected.remove(&id);
        }
    }

    /// Lets no more be told and waits until all commands have what was.
    pub(crate) async fn finish(&mut self) {
        self.connected.clear();
        while self.writers.join_next().await.is_some() {}
    }

    /// Forgets a command that went away.
    pub(crate) fn remove(&mut self, id: ClientId) {
        self.connected.remove(&id);
    }
}

async fn write(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::UnboundedReceiver<(Event, bool)>,
    waiting: Arc<AtomicUsize>,
) {
    while let Some((event, last)) = queue.recv().await {
        let sent = writer.send(&event).await;
        waiting.fetch_sub(size(&event), Ordering::Relaxed);
        if let Err(error) = sent {
            tracing::debug!(%error, "command went away");
            return;
        }
        if last {
            break;
        }
    }
    if let Err(error) = writer.finish().await {
        tracing::debug!(%error, "command went away");
    }
}

fn size(event: &Event) -> usize {
    match event {
        Event::Output { bytes, .. } => EVENT_BYTES + bytes.len(),
        _ => EVENT_BYTES,
    }
}
