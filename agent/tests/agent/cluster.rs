//! A coordinator that does what a test says, and agents as real as they are, on loopback.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crcoord_agent::{Agent, CoordinatorAddress, Settings, StartError};
use crcoord_common::ids::{Incarnation, JobKey, MemberId, MemberKey, NodeName, RequestId, Term};
use crcoord_common::wire::control::{Frame, FromAgent, ToAgent};
use crcoord_common::wire::member::{CapsuleSpec, Command, MemberNetwork, Owner, Placement, Stdio};
use crcoord_store::StoreError;
use crcoord_transport::pki::{self, Request};
use crcoord_transport::{
    Connection, Endpoint, Identity, IdentityPaths, Limits, Receiver, Role, Sender, Stream,
};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinHandle;

/// Bound of every wait.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The coordinator's side and everybody's files.
pub struct Cluster {
    directory: tempfile::TempDir,
    endpoint: Endpoint,
    address: SocketAddr,
}

impl Cluster {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(&directory.path().join("pki"), "c").unwrap();
        let mut cluster = Cluster {
            endpoint: Endpoint::bind(
                "127.0.0.1:0".parse().unwrap(),
                Identity::load(&issue(&directory, Role::Coordinator, "boss")).unwrap(),
                Limits::control(),
            )
            .unwrap(),
            directory,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        cluster.address = cluster.endpoint.local_address().unwrap();
        cluster
    }

    pub fn settings(&self, node: &str) -> Settings {
        let path = |name: &str| self.directory.path().join(format!("{node}-{name}"));
        let pki = self.directory.path().join("pki");
        let identity = match pki.join(format!("node-{node}.pem")).exists() {
            true => paths(&pki, Role::Node, node),
            false => issue(&self.directory, Role::Node, node),
        };
        Settings {
            node: node.parse().unwrap(),
            cluster: "c".parse().unwrap(),
            coordinators: vec![CoordinatorAddress {
                name: "boss".to_owned(),
                address: self.address.to_string(),
            }],
            listen: "127.0.0.1:0".parse().unwrap(),
            run_dir: path("run"),
            store_dir: path("store"),
            min_free_bytes: 1 << 20,
            identity,
            image_key: pki.join("image.key"),
            ..Settings::default()
        }
    }

    /// Starts an agent and welcomes it.
    pub async fn agent(&self, node: &str) -> Node {
        self.agent_with(self.settings(node), Term(1)).await
    }

    pub async fn agent_with(&self, settings: Settings, term: Term) -> Node {
        // The store of an agent that was stopped in this process is free once its tasks are gone.
        let started = async {
            loop {
                match Agent::start(settings.clone()).await {
                    Err(StartError::Store(StoreError::InUse { .. })) => {
                        tokio::task::yield_now().await;
                    }
                    other => break other.expect("the test needs root"),
                }
            }
        };
        let agent = soon(started).await;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(agent.serve(async move {
            if stopped.await.is_err() {
                std::future::pending::<()>().await; // the test forgot about it
            }
        }));
        let link = self.welcome(term).await;
        Node {
            link,
            stop,
            serving,
        }
    }

    /// Takes the next agent's call.
    pub async fn welcome(&self, term: Term) -> Link {
        let connection = soon(self.endpoint.accept()).await.unwrap();
        assert_eq!(connection.peer().role(), Role::Node);
        let Stream::Control(stream) = soon(connection.accept_stream()).await.unwrap() else {
            panic!("no control stream");
        };
        let (mut sender, mut receiver) = stream.split();
        let hello: Frame<FromAgent> = soon(receiver.recv()).await.unwrap().unwrap();
        let body = ToAgent::Welcome {
            heartbeat_ms: 200,
            cluster: "c".to_owned(),
        };
        sender
            .send(&Frame {
                request: RequestId(0),
                term,
                body,
            })
            .await
            .unwrap();
        let sender = Arc::new(Mutex::new(sender));
        let (frames, received) = mpsc::unbounded_channel();
        tokio::spawn(read(receiver, sender.clone(), frames));
        Link {
            sender,
            received,
            connection,
            hello: hello.body,
            term,
            next: 1,
            early: VecDeque::new(),
        }
    }
}

fn paths(pki: &std::path::Path, role: Role, name: &str) -> IdentityPaths {
    IdentityPaths {
        certificate: pki.join(format!("{role}-{name}.pem")),
        key: pki.join(format!("{role}-{name}.key")),
        authority: pki.join("ca.pem"),
    }
}

fn issue(directory: &tempfile::TempDir, role: Role, name: &str) -> IdentityPaths {
    let pki: PathBuf = directory.path().join("pki");
    let validity = Duration::from_secs(86400);
    let request = Request {
        role,
        name,
        subject_names: &[],
        validity,
    };
    pki::issue(&pki, &request, &pki).unwrap();
    paths(&pki, role, name)
}

/// A running agent and the link to it.
pub struct Node {
    pub link: Link,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Node {
    /// As SIGTERM does it.
    pub async fn stop(self) {
        self.stop.send(()).unwrap();
        soon(self.serving).await.unwrap();
    }
}

/// Answers heartbeats, as long as there is a link.
async fn read(
    mut receiver: Receiver,
    sender: Arc<Mutex<Sender>>,
    frames: mpsc::UnboundedSender<Frame<FromAgent>>,
) {
    while let Ok(Some(frame)) = receiver.recv::<Frame<FromAgent>>().await {
        if matches!(frame.body, FromAgent::Heartbeat { .. }) {
            let alive = Frame {
                request: frame.request,
                term: frame.term,
                body: ToAgent::Alive,
            };
            let _ = sender.lock().await.send(&alive).await;
        } else if frames.send(frame).is_err() {
            return;
        }
    }
}

/// The coordinator's end of an agent's control stream.
pub struct Link {
    sender: Arc<Mutex<Sender>>,
    received: mpsc::UnboundedReceiver<Frame<FromAgent>>,
    pub connection: Connection,
    pub hello: FromAgent,
    term: Term,
    next: u64,
    early: VecDeque<Frame<FromAgent>>,
}

impl Link {
    pub async fn tell(&mut self, body: ToAgent) -> RequestId {
        let request = RequestId(self.next);
        self.next += 1;
        let mut sender = self.sender.lock().await;
        sender
            .send(&Frame {
                request,
                term: self.term,
                body,
            })
            .await
            .unwrap();
        request
    }

    pub async fn ask(&mut self, body: ToAgent) -> FromAgent {
        let request = self.tell(body).await;
        self.answer(request).await
    }

    /// The next answer to this request.
    pub async fn answer(&mut self, request: RequestId) -> FromAgent {
        self.find(|frame| frame.request == request).await
    }

    /// The next event of this kind.
    pub async fn event(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        self.find(|frame| frame.request == RequestId(0) && wanted(&frame.body))
            .await
    }

    async fn find(&mut self, wanted: impl Fn(&Frame<FromAgent>) -> bool) -> FromAgent {
        if let Some(index) = self.early.iter().position(&wanted) {
            return self.early.remove(index).unwrap().body;
        }
        let search = async {
            loop {
                let frame: Frame<FromAgent> = self.received.recv().await.expect("the link ended");
                assert_eq!(frame.term, self.term);
                if wanted(&frame) {
                    return frame.body;
                }
                if !matches!(frame.body, FromAgent::Progress { .. }) {
                    self.early.push_back(frame);
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("nothing came; seen: {:?}", self.early))
    }
}

pub async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("in time")
}

pub fn key(id: &str, incarnation: u32) -> MemberKey {
    let job = JobKey {
        cluster: "c".parse().unwrap(),
        id: id.parse().unwrap(),
        submitted: 5,
    };
    MemberKey {
        job,
        incarnation: Incarnation(incarnation),
        member: MemberId(0),
    }
}

pub fn spec() -> CapsuleSpec {
    let placement = |member, node: &str| Placement {
        member: MemberId(member),
        node: node.parse::<NodeName>().unwrap(),
        address: IpAddr::from([10, 0, 0, 1]),
    };
    CapsuleSpec {
        owner: Owner {
            uid: 1234,
            gid: 1234,
            groups: vec![],
        },
        stdio: Stdio::Caller,
        network: MemberNetwork::Host,
        hostname: "n1".to_owned(),
        run_lease_ms: None,
        placements: vec![placement(0, "n1"), placement(1, "n2")],
    }
}

pub fn shell(script: &str) -> Command {
    Command {
        arguments: ["sh", "-c", script].map(str::to_owned).to_vec(),
        environment: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
        directory: "/tmp".to_owned(),
        umask: 0o22,
    }
}
