//! The agents' side: accepts connections, checks who is there, reads and writes control streams.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crcoord_common::ids::{ClusterName, NodeName};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::control::{Frame, FromAgent, ToAgent};
use crcoord_protocol::{Hello, Input, SessionId};
use crcoord_transport::{
    CLOSE_SHUTDOWN, Connection, ControlStream, Endpoint, Receiver, Role, Sender, Stream,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::driver::Message;

/// Code of a connection that is closed because its agent is refused; the reason says why.
pub(crate) const CLOSE_REFUSED: u32 = 256;

/// An agent must have said Hello within this time.
const HELLO_TIME: Duration = Duration::from_secs(10);

/// Messages that may wait for one agent; beyond that it reads too slowly to be of use.
const WAITING_LIMIT: usize = 1 << 16;

/// Connected agents, by session.
#[derive(Debug, Default)]
pub(crate) struct Agents {
    connected: BTreeMap<SessionId, Agent>,
    writers: JoinSet<()>,
}

#[derive(Debug)]
struct Agent {
    connection: Connection,
    frames: mpsc::Sender<Frame<ToAgent>>,
}

impl Agents {
    /// Takes a connection; frames go out by a task of their own.
    pub(crate) fn add(&mut self, session: SessionId, connection: Connection, sender: Sender) {
        let (frames, queue) = mpsc::channel(WAITING_LIMIT);
        while self.writers.try_join_next().is_some() {}
        self.writers.spawn(write(sender, queue, connection.clone()));
        self.connected.insert(session, Agent { connection, frames });
    }

    /// Sends a frame. A connection that does not take it is closed: its reader then tells so.
    pub(crate) fn send(&mut self, session: SessionId, frame: Frame<ToAgent>) {
        if let Some(agent) = self.connected.get(&session)
            && agent.frames.try_send(frame).is_err()
        {
            agent
                .connection
                .close(CLOSE_REFUSED, "the agent reads too slowly");
        }
    }

    /// Closes a connection.
    pub(crate) fn drop_session(&mut self, session: SessionId, reason: &str) {
        if let Some(agent) = self.connected.remove(&session) {
            agent.connection.close(CLOSE_REFUSED, reason);
        }
    }

    /// Lets no more be sent and waits until all agents have what was.
    pub(crate) async fn finish(&mut self) {
        self.connected.clear();
        while self.writers.join_next().await.is_some() {}
    }

    /// Forgets a connection that ended.
    pub(crate) fn remove(&mut self, session: SessionId) {
        self.connected.remove(&session);
    }
}

async fn write(
    mut sender: Sender,
    mut queue: mpsc::Receiver<Frame<ToAgent>>,
    connection: Connection,
) {
    while let Some(frame) = queue.recv().await {
        if let Err(error) = sender.send(&frame).await {
            tracing::debug!(peer = %connection.peer(), %error, "agent not reached");
            connection.close(CLOSE_SHUTDOWN, "the control stream failed");
            return;
        }
    }
    if let Err(error) = sender.finish().await {
        tracing::debug!(peer = %connection.peer(), %error, "agent not reached");
    }
}

/// Accepts agents until the endpoint is shut down.
pub(crate) async fn serve(
    endpoint: Arc<Endpoint>,
    cluster: ClusterName,
    queue: mpsc::Sender<Message>,
) {
    let sessions = Arc::new(AtomicU64::new(1));
    while let Some(connection) = endpoint.accept().await {
        let (cluster, queue, sessions) = (cluster.clone(), queue.clone(), sessions.clone());
        tokio::spawn(async move {
            let greeted = tokio::time::timeout(HELLO_TIME, greet(&connection, &cluster)).await;
            let greeted = greeted.unwrap_or_else(|_| Err("no hello was received in time".into()));
            match greeted {
                Ok((node, hello, stream)) => {
                    let session = SessionId(sessions.fetch_add(1, Ordering::Relaxed));
                    converse(node, session, hello, connection, stream, &queue).await;
                }
                Err(reason) => {
                    let address = connection.remote_address();
                    tracing::warn!(peer = %connection.peer(), %address, reason, "agent refused");
                    connection.close(CLOSE_REFUSED, &reason);
                }
            }
        });
    }
}

/// Waits for the control stream and its Hello, and compares that with the certificate.
async fn greet(
    connection: &Connection,
    cluster: &ClusterName,
) -> Result<(NodeName, Hello, ControlStream), String> {
    let peer = connection.peer();
    if peer.role() != Role::Node {
        return Err(format!("{peer} is no node"));
    }
    if peer.cluster() != cluster.as_str() {
        let theirs = peer.cluster();
        return Err(format!(
            "{peer} is of cluster {theirs}, this coordinator of {cluster}"
        ));
    }
    let mut stream = match connection.accept_stream().await {
        Ok(Stream::Control(stream)) => stream,
        Ok(Stream::Bulk(_)) => return Err("a bulk stream was opened to the coordinator".into()),
        Err(error) => return Err(error.to_string()),
    };
    let first = stream.receiver.recv::<Frame<FromAgent>>().await;
    let frame = match first {
        Ok(Some(frame)) => frame,
        Ok(None) => return Err("the control stream ended before its hello".into()),
        Err(error) => return Err(error.to_string()),
    };
    let FromAgent::Hello {
        version,
        node,
        bulk,
        members,
        parts,
        free_bytes,
    } = frame.body
    else {
        return Err("the first message is no hello".into());
    };
    if version != WIRE_VERSION {
        return Err(format!(
            "{node} speaks wire version {version}, this coordinator {WIRE_VERSION}: \
             install the same release on both"
        ));
    }
    if node.as_str() != peer.name() {
        return Err(format!(
            "the agent calls itself {node}, its certificate is for {peer}"
        ));
    }
    let hello = Hello {
        bulk,
        term: frame.term,
        members,
        parts,
        free_bytes,
    };
    Ok((node, hello, stream))
}

async fn converse(
    node: NodeName,
    session: SessionId,
    hello: Hello,
    connection: Connection,
    stream: ControlStream,
    queue: &mpsc::Sender<Message>,
) {
    let (sender, receiver) = stream.split();
    let connected = Message::AgentConnected {
        node: node.clone(),
        session,
        hello,
        connection: connection.clone(),
        sender,
    };
    if queue.send(connected).await.is_err() {
        return;
    }
    let reason = read(&node, session, receiver, queue).await;
    tracing::info!(%node, session = session.0, reason, "agent connection ended");
    connection.close(CLOSE_SHUTDOWN, "the control stream ended");
    // Fails only when the driver is gone, too.
    let _ = queue
        .send(Message::Input(Input::Disconnected { node, session }))
        .await;
}

/// Hands messages on until the stream ends, and tells why it did.
async fn read(
    node: &NodeName,
    session: SessionId,
    mut receiver: Receiver,
    queue: &mpsc::Sender<Message>,
) -> String {
    loop {
        let frame = match receiver.recv::<Frame<FromAgent>>().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return "ended by the agent".to_owned(),
            Err(error) => return error.to_string(),
        };
        let input = Input::Message {
            node: node.clone(),
            session,
            frame,
        };
        if queue.send(Message::Input(input)).await.is_err() {
            return "the coordinator stops".to_owned();
        }
    }
}
