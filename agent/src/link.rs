//! The link to the coordinator: hello, heartbeats, reconnecting for ever, and terms.
//!
//! Members run on whatever happens here; holds end by their own leases.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crcoord_common::ids::{RequestId, Term};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::control::{Frame, FromAgent, PartState as WirePart, ToAgent};
use crcoord_store::PartState;
use crcoord_transport::{CLOSE_PROTOCOL, Connection, ControlStream, Receiver, Role, Sender};
use tokio::time::{Instant, MissedTickBehavior};

use crate::dispatch;
use crate::members::write_durably;
use crate::node::{Node, blocking, locked};
use crate::outbox::Outgoing;
use crate::settings::CoordinatorAddress;

/// Pause after a failed attempt; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long the coordinator may take to answer a Hello.
const WELCOME: Duration = Duration::from_secs(10);
/// A coordinator that answers no heartbeat for this long is called anew.
const SILENCE: Duration = Duration::from_secs(20);

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Address(String),
    #[error(transparent)]
    Connect(#[from] crcoord_transport::ConnectError),
    #[error(transparent)]
    Stream(#[from] crcoord_transport::StreamError),
    #[error(transparent)]
    Frame(#[from] crcoord_transport::FrameError),
    #[error("the connection was lost: {0}")]
    Lost(crcoord_transport::Lost),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("the coordinator was silent for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the coordinator is of term {found}, term {newest} was seen already")]
    StaleTerm { found: Term, newest: Term },
    #[error("the coordinator is of cluster {found:?}, this agent of {own:?}")]
    Cluster { found: String, own: String },
    #[error("the first message was no welcome")]
    NoWelcome,
    #[error("the newest term could not be written down: {0}")]
    Term(std::io::Error),
}

/// Keeps a link for ever.
pub async fn keep(node: Arc<Node>, mut outgoing: Outgoing) {
    let mut link = Link {
        newest: read_term(&node),
        unsent: None,
    };
    let mut pause = FIRST_PAUSE;
    let mut said = false;
    loop {
        for coordinator in &node.settings.coordinators {
            let started = Instant::now();
            match link.run(&node, coordinator, &mut outgoing).await {
                Ok(never) => match never {},
                Err(error) => {
                    let lived = started.elapsed() > 2 * LONGEST_PAUSE;
                    if lived {
                        (pause, said) = (FIRST_PAUSE, false);
                    }
                    // Once per outage; a coordinator that is down for a day is no news.
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(coordinator = coordinator.address, %error, "no link");
                    } else {
                        tracing::debug!(coordinator = coordinator.address, %error, "no link");
                    }
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

enum Never {}

struct Link {
    newest: Term,
    /// Taken from the queue but not sent when a link broke.
    unsent: Option<Frame<FromAgent>>,
}

impl Link {
    async fn run(
        &mut self,
        node: &Arc<Node>,
        coordinator: &CoordinatorAddress,
        outgoing: &mut Outgoing,
    ) -> Result<Never, LinkError> {
        let connection = call(node, coordinator).await?;
        let outcome = self
            .talk(node, &connection, outgoing)
            .await
            .map_err(|error| {
                // Why the connection ended says more than that a stream on it failed.
                connection.lost_reason().map_or(error, LinkError::Lost)
            });
        // Told anew after each Hello.
        node.members.listen_to_none();
        if let Err(error) = &outcome {
            connection.close(CLOSE_PROTOCOL, &error.to_string());
        }
        outcome
    }

    async fn talk(
        &mut self,
        node: &Arc<Node>,
        connection: &Connection,
        outgoing: &mut Outgoing,
    ) -> Result<Never, LinkError> {
        let ControlStream {
            mut sender,
            mut receiver,
        } = connection.open_control().await?;
        let hello = hello(node).await?;
        sender
            .send(&Frame {
                request: RequestId(0),
                term: self.newest,
                body: hello,
            })
            .await?;
        let (term, heartbeat) = tokio::time::timeout(WELCOME, self.welcomed(node, &mut receiver))
            .await
            .map_err(|_| LinkError::Silent(WELCOME))??;
        tracing::info!(peer = %connection.peer(), address = %connection.remote_address(), %term, "linked");
        // Both at once: a coordinator that does not read must not keep us from hearing it.
        tokio::select! {
            outcome = hear(node, term, &mut receiver) => outcome,
            outcome = self.tell(node, term, heartbeat, &mut sender, outgoing) => outcome,
        }
    }

    async fn welcomed(
        &mut self,
        node: &Arc<Node>,
        receiver: &mut Receiver,
    ) -> Result<(Term, Duration), LinkError> {
        let frame: Frame<ToAgent> = receiver.recv().await?.ok_or(LinkError::Closed)?;
        let ToAgent::Welcome {
            heartbeat_ms,
            cluster,
        } = frame.body
        else {
            return Err(LinkError::NoWelcome);
        };
        let own = node.settings.cluster.as_str();
        if cluster != own {
            return Err(LinkError::Cluster {
                found: cluster,
                own: own.to_owned(),
            });
        }
        if frame.term < self.newest {
            return Err(LinkError::StaleTerm {
                found: frame.term,
                newest: self.newest,
            });
        }
        if frame.term > self.newest {
            write_term(node, frame.term)
                .await
                .map_err(LinkError::Term)?;
            self.newest = frame.term;
        }
        Ok((
            frame.term,
            Duration::from_millis(heartbeat_ms.clamp(10, 60_000)),
        ))
    }

    async fn tell(
        &mut self,
        node: &Arc<Node>,
        term: Term,
        heartbeat: Duration,
        sender: &mut Sender,
        outgoing: &mut Outgoing,
    ) -> Result<Never, LinkError> {
        let mut ticks = tokio::time::interval(heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.unsent.is_none() {
                tokio::select! {
                    Some(frame) = outgoing.next() => self.unsent = Some(frame),
                    _ = ticks.tick() => {
                        let here = node.clone();
                        let free_bytes = blocking(move || here.free_bytes()).await;
                        let body = FromAgent::Heartbeat { free_bytes };
                        sender.send(&Frame { request: RequestId(0), term, body }).await?;
                    }
                }
            }
            if let Some(frame) = &mut self.unsent {
                if frame.term == Term(0) {
                    frame.term = term;
                }
                // Answers to an earlier leader mean nothing to this one.
                if frame.term == term || frame.request == RequestId(0) {
                    frame.term = term;
                    sender.send(frame).await?;
                }
                self.unsent = None;
            }
        }
    }
}

async fn hear(node: &Arc<Node>, term: Term, receiver: &mut Receiver) -> Result<Never, LinkError> {
    loop {
        let frame = tokio::time::timeout(SILENCE, receiver.recv::<Frame<ToAgent>>()).await;
        let frame = frame
            .map_err(|_| LinkError::Silent(SILENCE))??
            .ok_or(LinkError::Closed)?;
        if frame.term < term {
            // A leader that was replaced: nothing it wants is done.
            return Err(LinkError::StaleTerm {
                found: frame.term,
                newest: term,
            });
        }
        dispatch::serve(node, frame);
    }
}

async fn call(node: &Arc<Node>, coordinator: &CoordinatorAddress) -> Result<Connection, LinkError> {
    let unknown = |reason: String| LinkError::Address(format!("{}: {reason}", coordinator.address));
    let bound = node
        .endpoint
        .local_address()
        .map_err(|error| unknown(error.to_string()))?;
    let addresses = tokio::net::lookup_host(&coordinator.address).await;
    let addresses = addresses.map_err(|error| unknown(error.to_string()))?;
    let expected = node
        .endpoint
        .identity()
        .peer_named(Role::Coordinator, &coordinator.name)
        .map_err(|error| unknown(error.to_string()))?;
    let mut last = None;
    // A socket bound to an IPv4 address reaches IPv4 peers only.
    for address in addresses.filter(|address| address.is_ipv4() == bound.is_ipv4()) {
        if let Some(route) = route_to(address) {
            *locked(&node.route) = Some(route);
        }
        match node.endpoint.connect(address, &expected).await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(
        || unknown("has no usable address".to_owned()),
        LinkError::Connect,
    ))
}

/// Our own address on the way to another: no packet is sent for it.
fn route_to(address: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(address).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

async fn hello(node: &Arc<Node>) -> Result<FromAgent, LinkError> {
    let bulk = node
        .bulk_address()
        .map_err(|error| LinkError::Address(error.to_string()))?;
    let here = node.clone();
    let (parts, free_bytes) = blocking(move || (parts(&here), here.free_bytes())).await;
    Ok(FromAgent::Hello {
        version: WIRE_VERSION,
        node: node.settings.node.clone(),
        bulk,
        members: node.members.states(),
        parts,
        free_bytes,
    })
}

fn parts(node: &Node) -> Vec<WirePart> {
    let parts = node.store.parts().unwrap_or_else(|error| {
        tracing::error!(%error, "the store cannot be listed");
        Vec::new()
    });
    parts
        .into_iter()
        .filter(|part| !matches!(part.state, PartState::Damaged(_)))
        .map(|part| WirePart {
            committed: part.state == PartState::Committed,
            part: part.part,
        })
        .collect()
}

fn read_term(node: &Node) -> Term {
    let text = std::fs::read_to_string(node.settings.run_dir.join("term")).unwrap_or_default();
    Term(text.trim().parse().unwrap_or(0))
}

async fn write_term(node: &Arc<Node>, term: Term) -> std::io::Result<()> {
    let path = node.settings.run_dir.join("term");
    blocking(move || write_durably(&path, format!("{term}\n").as_bytes())).await
}
