//! A real coordinator on loopback with agents that answer as healthy ones do, without any process.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its own part; a failure is a panic

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, MemberKey, PartKey, RequestId, Term};
use crcoord_common::image::ChunkId;
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::control::{
    CaptureSummary, CopyTarget, Frame, FromAgent, MemberState, PartState, Preflight, ToAgent,
};
use crcoord_common::wire::member::{Command, MemberCommit, NetworkMode, Owner, Replica, Stdio};
use crcoord_coordinator::{CoordinatorError, Daemon, Settings};
use crcoord_transport::pki::{self, DEFAULT_VALIDITY};
use crcoord_transport::{
    ControlStream, Endpoint, FrameReader, FrameWriter, Identity, IdentityPaths, Limits, Lost, Peer,
    Role,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Longer than anything here takes; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn patiently<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

/// A cluster's directory: certificates, journal, socket.
pub struct Site {
    directory: TempDir,
    pub settings: Settings,
}

impl Site {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), "test").unwrap();
        let identity = issue(&directory, Role::Coordinator, "c1");
        let settings = Settings {
            cluster: "test".parse().unwrap(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            socket: directory.path().join("coordinator.sock"),
            state_dir: directory.path().join("state"),
            identity,
            heartbeat_ms: 200,
            ..Settings::default()
        };
        Site {
            directory,
            settings,
        }
    }

    pub fn identity(&self, role: Role, name: &str) -> Identity {
        Identity::load(&issue(&self.directory, role, name)).unwrap()
    }

    pub async fn start(&self) -> Running {
        let daemon = Daemon::start(self.settings.clone()).await.unwrap();
        let address = daemon.address();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(daemon.serve(async {
            let _ = stopped.await;
        }));
        Running {
            address,
            stop,
            task,
        }
    }

    pub async fn ask(&self, request: &Request) -> Asked {
        let stream = UnixStream::connect(&self.settings.socket).await.unwrap();
        let (read, write) = stream.into_split();
        let mut asked = Asked {
            reader: FrameReader::new(read),
            writer: FrameWriter::new(write),
        };
        asked.writer.send(request).await.unwrap();
        asked
    }

    /// The last event of a request.
    pub async fn result(&self, request: &Request) -> Event {
        self.ask(request).await.result().await
    }

    /// Waits until so many nodes are connected.
    pub async fn connected(&self, count: usize) {
        patiently("agents connect", async {
            loop {
                if let Event::Cluster { nodes, .. } = self.result(&Request::Status).await
                    && nodes.iter().filter(|node| node.connected).count() == count
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

fn issue(directory: &TempDir, role: Role, name: &str) -> IdentityPaths {
    let path = directory.path();
    let stem = path.join(format!("{role}-{name}"));
    if !stem.with_extension("pem").exists() {
        let request = pki::Request {
            role,
            name,
            subject_names: &[],
            validity: DEFAULT_VALIDITY,
        };
        pki::issue(path, &request, path).unwrap();
    }
    IdentityPaths {
        certificate: stem.with_extension("pem"),
        key: stem.with_extension("key"),
        authority: path.join(pki::AUTHORITY_CERTIFICATE),
    }
}

/// A coordinator that runs.
pub struct Running {
    pub address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), CoordinatorError>>,
}

impl Running {
    /// Stops it in good order.
    pub async fn stop(self) {
        self.stop.send(()).unwrap();
        patiently("the coordinator stops", self.task)
            .await
            .unwrap()
            .unwrap();
    }

    /// Ends it at once, without a word to anybody, as kill -9 does.
    pub async fn crash(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

/// A request that is being answered.
pub struct Asked {
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
}

impl Asked {
    pub async fn next(&mut self) -> Option<Event> {
        patiently("an event", self.reader.recv::<Event>())
            .await
            .unwrap()
    }

    /// The last event before the coordinator closes.
    pub async fn result(mut self) -> Event {
        let mut last = None;
        while let Some(event) = self.next().await {
            last = Some(event);
        }
        last.unwrap()
    }
}

/// What an agent keeps over its connections.
#[derive(Default)]
struct Memory {
    members: BTreeMap<MemberKey, MemberState>,
    parts: BTreeMap<(PartKey, Epoch), bool>,
    term: Term,
}

/// How an agent fails, and at which order.
#[derive(Clone, Copy)]
pub enum Lapse {
    /// It drops its connection.
    Vanish(&'static str),
    /// It stays connected and does not answer.
    Mute(&'static str),
}

/// An agent that answers, until it is told to vanish.
pub struct Agent {
    /// Orders it has received, in order.
    pub orders: mpsc::UnboundedReceiver<ToAgent>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Memory>,
    name: String,
}

impl Agent {
    /// Connects as node `name`.
    pub async fn start(site: &Site, address: SocketAddr, name: &str, lapse: Option<Lapse>) -> Self {
        Self::resume(site, address, name, lapse, Memory::default()).await
    }

    async fn resume(
        site: &Site,
        address: SocketAddr,
        name: &str,
        lapse: Option<Lapse>,
        memory: Memory,
    ) -> Self {
        let endpoint = Endpoint::bind(
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            site.identity(Role::Node, name),
            Limits::default(),
        )
        .unwrap();
        let (seen, orders) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let own = name.to_owned();
        let task = tokio::spawn(async move {
            serve(endpoint, address, own, lapse, memory, seen, stopped).await
        });
        Agent {
            orders,
            stop,
            task,
            name: name.to_owned(),
        }
    }

    /// Drops its connection and connects again, perhaps elsewhere, with all its members.
    pub async fn reconnect(self, site: &Site, address: SocketAddr) -> Agent {
        let name = self.name.clone();
        let memory = self.end().await;
        Agent::resume(site, address, &name, None, memory).await
    }

    /// Ends without a farewell.
    pub async fn vanish(self) {
        self.end().await;
    }

    async fn end(self) -> Memory {
        let _ = self.stop.send(()); // it may have vanished already
        patiently("an agent ends", self.task).await.unwrap()
    }

    /// Waits for an order.
    pub async fn expect(&mut self, name: &str) -> ToAgent {
        patiently(name, async {
            loop {
                let order = self.orders.recv().await.unwrap();
                if name_of(&order) == name {
                    return order;
                }
            }
        })
        .await
    }
}

async fn serve(
    endpoint: Endpoint,
    address: SocketAddr,
    name: String,
    lapse: Option<Lapse>,
    mut memory: Memory,
    seen: mpsc::UnboundedSender<ToAgent>,
    mut stopped: oneshot::Receiver<()>,
) -> Memory {
    let expected = Peer::new("test", Role::Coordinator, "c1").unwrap();
    let connection = endpoint.connect(address, &expected).await.unwrap();
    let mut stream = connection.open_control().await.unwrap();
    let hello = FromAgent::Hello {
        version: WIRE_VERSION,
        node: name.parse().unwrap(),
        bulk: endpoint.local_address().unwrap(),
        members: memory.members.values().cloned().collect(),
        parts: memory
            .parts
            .iter()
            .map(|((part, _), committed)| PartState {
                part: part.clone(),
                committed: *committed,
            })
            .collect(),
        free_bytes: 1 << 30,
    };
    send(&mut stream, RequestId(0), memory.term, hello).await;
    let mut beat = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            frame = stream.receiver.recv::<Frame<ToAgent>>() => {
                let Ok(Some(frame)) = frame else { return memory };
                memory.term = frame.term;
                let order = frame.body;
                let _ = seen.send(order.clone()); // the test may not look any more
                match lapse {
                    Some(Lapse::Vanish(at)) if at == name_of(&order) => return memory,
                    Some(Lapse::Mute(at)) if at == name_of(&order) => continue,
                    _ => {}
                }
                for answer in memory.answers(&name, order) {
                    send(&mut stream, frame.request, frame.term, answer).await;
                }
            }
            _ = beat.tick(), if memory.term != Term(0) => {
                let heartbeat = FromAgent::Heartbeat { free_bytes: 1 << 30 };
                let term = memory.term;
                send(&mut stream, RequestId(0), term, heartbeat).await;
            }
            _ = &mut stopped => return memory,
        }
    }
}

async fn send(stream: &mut ControlStream, request: RequestId, term: Term, body: FromAgent) {
    let frame = Frame {
        request,
        term,
        body,
    };
    // A connection that is gone is noticed by the receiver.
    let _ = stream.sender.send(&frame).await;
}

impl Memory {
    fn answers(&mut self, node: &str, order: ToAgent) -> Vec<FromAgent> {
        match order {
            ToAgent::Start { key, .. } | ToAgent::Adopt { key, .. } => {
                let state = MemberState {
                    key: key.clone(),
                    ended: None,
                    epoch: None,
                };
                self.members.insert(key, state);
                let owner = Owner {
                    uid: 0,
                    gid: 0,
                    groups: Vec::new(),
                };
                vec![FromAgent::Started { pid: 1, owner }]
            }
            ToAgent::Preflight { .. } => vec![FromAgent::Preflighted(Preflight::default())],
            ToAgent::Hold { key, epoch, .. } => {
                self.members.get_mut(&key).unwrap().epoch = Some(epoch);
                vec![FromAgent::Held { freeze_us: 10 }]
            }
            ToAgent::Capture { .. } => vec![FromAgent::Captured(CaptureSummary::default())],
            ToAgent::Release { key, epoch, copies } => {
                self.members.get_mut(&key).unwrap().epoch = None;
                let part = PartKey {
                    job: key.job.clone(),
                    epoch,
                    member: key.member,
                };
                self.parts.insert((part, epoch), false);
                let copies = copies.into_iter().map(|copy| match copy {
                    CopyTarget::Partner { node, .. } => Replica::Node(node),
                    CopyTarget::Shared => Replica::Shared,
                });
                let own = Replica::Node(node.parse().unwrap());
                let commit = MemberCommit {
                    member: key.member,
                    node: node.parse().unwrap(),
                    manifest: ChunkId([7; 32]),
                    replicas: std::iter::once(own).chain(copies).collect(),
                    raw_bytes: 4096,
                    stored_bytes: 100,
                    freeze_us: 0,
                    connections: Vec::new(),
                };
                vec![
                    FromAgent::Released { frozen_us: 20 },
                    FromAgent::Progress {
                        key,
                        epoch,
                        done_bytes: 4096,
                        total_bytes: 4096,
                    },
                    FromAgent::Sealed { commit },
                ]
            }
            ToAgent::Kill { key } => {
                self.members.remove(&key);
                vec![FromAgent::Killed]
            }
            ToAgent::Build { key, .. } => {
                let state = MemberState {
                    key: key.clone(),
                    ended: None,
                    epoch: None,
                };
                self.members.insert(key, state);
                vec![FromAgent::Built {
                    fetched_bytes: 0,
                    filled_bytes: 4096,
                    replica: None,
                }]
            }
            ToAgent::Abort { key, .. } => {
                if let Some(member) = self.members.get_mut(&key) {
                    member.epoch = None;
                }
                vec![FromAgent::Done]
            }
            ToAgent::Commit { part, record } => {
                let record = CommitRecord::decode(&record).unwrap();
                assert_eq!(record.epoch, part.epoch);
                for ((of, _), committed) in &mut self.parts {
                    *committed |= of.epoch == part.epoch;
                }
                vec![FromAgent::Done]
            }
            ToAgent::Check => vec![FromAgent::Checked {
                findings: Vec::new(),
            }],
            ToAgent::Renew { .. }
            | ToAgent::Retire { .. }
            | ToAgent::Signal { .. }
            | ToAgent::Resume { .. } => vec![FromAgent::Done],
            ToAgent::Welcome { .. }
            | ToAgent::Alive
            | ToAgent::RunLease { .. }
            | ToAgent::Listen { .. }
            | ToAgent::Forget { .. } => Vec::new(),
        }
    }
}

pub fn name_of(order: &ToAgent) -> &'static str {
    match order {
        ToAgent::Welcome { .. } => "welcome",
        ToAgent::Hold { .. } => "hold",
        ToAgent::Abort { .. } => "abort",
        ToAgent::Commit { .. } => "commit",
        ToAgent::Kill { .. } => "kill",
        ToAgent::Build { .. } => "build",
        ToAgent::Resume { .. } => "resume",
        ToAgent::RunLease { .. } => "run-lease",
        _ => "other",
    }
}

pub fn run(nodes: &[&str], run_lease_ms: Option<u64>) -> Request {
    Request::Run {
        job: "42".parse().unwrap(),
        nodes: nodes.iter().map(|name| name.parse().unwrap()).collect(),
        command: Command {
            arguments: vec!["./app".into()],
            environment: BTreeMap::new(),
            directory: "/".into(),
            umask: 0o022,
        },
        groups: Vec::new(),
        stdio: Stdio::Caller,
        network: NetworkMode::Virtual,
        run_lease_ms,
        attach: false,
    }
}

pub fn checkpoint() -> Request {
    Request::Checkpoint {
        job: "42".parse().unwrap(),
        adopt: None,
        kill: false,
        wait: true,
        reset_external_tcp: false,
    }
}

pub fn restart(confirmed_dead: &[&str]) -> Request {
    Request::Restart {
        job: "42".parse().unwrap(),
        epoch: None,
        nodes: Vec::new(),
        confirmed_dead: confirmed_dead
            .iter()
            .map(|name| name.parse().unwrap())
            .collect(),
        attach: false,
    }
}

pub fn show() -> Request {
    Request::Show {
        job: "42".parse().unwrap(),
    }
}

/// Connects to `address` as somebody and tells why the coordinator closed the connection.
pub async fn refused(
    site: &Site,
    address: SocketAddr,
    role: Role,
    name: &str,
    hello: FromAgent,
) -> String {
    let endpoint = Endpoint::bind(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        site.identity(role, name),
        Limits::default(),
    )
    .unwrap();
    let expected = Peer::new("test", Role::Coordinator, "c1").unwrap();
    let connection = endpoint.connect(address, &expected).await.unwrap();
    if let Ok(mut stream) = connection.open_control().await {
        send(&mut stream, RequestId(0), Term(0), hello).await;
        match patiently("a refusal", connection.closed()).await {
            Lost::ClosedByPeer { reason, .. } => return reason,
            other => panic!("{other}"),
        }
    }
    match connection.lost_reason() {
        Some(Lost::ClosedByPeer { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

pub fn socket_of(site: &Site) -> PathBuf {
    site.settings.socket.clone()
}
