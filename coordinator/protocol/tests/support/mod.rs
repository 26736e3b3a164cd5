//! A coordinator in virtual time with scripted agents, commands and a journal.
#![allow(dead_code)] // each test uses its own share of it

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crcoord_common::ids::{Epoch, MemberId, MemberKey, NodeName, RequestId, Term};
use crcoord_common::image::ChunkId;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, JobInfo, Request};
use crcoord_common::wire::control::{
    CaptureSummary, CopyTarget, Frame, FromAgent, MemberState, Preflight, ToAgent,
};
use crcoord_common::wire::member::{
    Command, ExitStatus, MemberCommit, NetworkMode, Owner, Replica, Stdio,
};
use crcoord_protocol::{
    Action, ClientId, Coordinator, Hello, Input, Millis, Record, Sequence, SessionId, Settings,
};

/// Seconds since 1970 at the virtual time 0.
pub const UNIX: u64 = 1_800_000_000;

/// An order as an agent received it.
#[derive(Clone, Debug)]
pub struct Order {
    pub node: NodeName,
    pub session: SessionId,
    pub request: RequestId,
    pub term: Term,
    pub body: ToAgent,
}

pub struct World {
    pub machine: Coordinator,
    pub settings: Settings,
    pub now: Millis,
    pub journal: Vec<Record>,
    /// Records that are handed out and not durable yet.
    pub unwritten: VecDeque<(Sequence, Record)>,
    /// False: records stay unwritten until `write`.
    pub writes: bool,
    pub orders: VecDeque<Order>,
    pub told: Vec<(ClientId, Event, bool)>,
    pub sessions: BTreeMap<NodeName, SessionId>,
    pub dropped: BTreeSet<SessionId>,
    /// Agents number their heartbeats.
    pub numbered: bool,
    next_session: u64,
    next_client: u64,
}

pub fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

pub fn settings() -> Settings {
    Settings::new("test".parse().unwrap())
}

pub fn owner(uid: u32) -> Owner {
    Owner {
        uid,
        gid: uid,
        groups: Vec::new(),
    }
}

pub fn refused() -> FromAgent {
    FromAgent::Failed(Report::new(
        "test-failed",
        Class::Failure,
        "the test wants it so",
    ))
}

impl World {
    /// A coordinator in its first term with these nodes connected.
    pub fn new(nodes: &[&str]) -> Self {
        Self::with(settings(), nodes)
    }

    pub fn with(settings: Settings, nodes: &[&str]) -> Self {
        let mut world = World {
            machine: Coordinator::recover(settings.clone(), []),
            settings,
            now: Millis(0),
            journal: Vec::new(),
            unwritten: VecDeque::new(),
            writes: true,
            orders: VecDeque::new(),
            told: Vec::new(),
            sessions: BTreeMap::new(),
            dropped: BTreeSet::new(),
            numbered: true,
            next_session: 0,
            next_client: 0,
        };
        world.machine.begin(Millis(0), UNIX);
        world.poll();
        for name in nodes {
            world.connect(name, Vec::new());
        }
        world.take_orders();
        world
    }

    /// The coordinator is killed and started again: what was not durable is lost.
    pub fn restart_coordinator(&mut self) {
        self.unwritten.clear();
        self.orders.clear();
        self.sessions.clear();
        self.machine = Coordinator::recover(self.settings.clone(), self.journal.clone());
        let unix = UNIX + self.now.0 / 1000;
        self.now = Millis(0);
        self.machine.begin(Millis(0), unix);
        self.poll();
    }

    pub fn connect(&mut self, name: &str, members: Vec<MemberState>) -> SessionId {
        self.next_session += 1;
        let session = SessionId(self.next_session);
        self.sessions.insert(node(name), session);
        let number: u16 = name.bytes().map(u16::from).sum();
        let hello = Hello {
            bulk: format!("10.0.0.{}:7117", number % 250).parse().unwrap(),
            term: Term(0),
            members,
            parts: Vec::new(),
            free_bytes: 1,
        };
        self.input(Input::Connected {
            node: node(name),
            session,
            hello,
        });
        session
    }

    pub fn disconnect(&mut self, name: &str) {
        let name = node(name);
        let session = self.sessions.remove(&name).unwrap();
        self.input(Input::Disconnected {
            node: name,
            session,
        });
    }

    pub fn input(&mut self, input: Input) {
        self.machine.handle(self.now, input);
        self.poll();
    }

    fn poll(&mut self) {
        loop {
            while let Some(action) = self.machine.poll_action() {
                self.carry_out(action);
            }
            if !self.writes || self.unwritten.is_empty() {
                return;
            }
            self.write();
        }
    }

    /// Makes everything durable that was handed out.
    pub fn write(&mut self) {
        let Some((last, _)) = self.unwritten.back() else {
            return;
        };
        let last = *last;
        let records = std::mem::take(&mut self.unwritten);
        self.journal
            .extend(records.into_iter().map(|(_, record)| record));
        self.machine.handle(self.now, Input::Persisted(last));
        while let Some(action) = self.machine.poll_action() {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Persist { sequence, record } => self.unwritten.push_back((sequence, *record)),
            Action::Send {
                node,
                session,
                frame,
            } => {
                let Frame {
                    request,
                    term,
                    body,
                } = *frame;
                self.orders.push_back(Order {
                    node,
                    session,
                    request,
                    term,
                    body,
                });
            }
            Action::Drop { node, session, .. } => {
                if self.sessions.get(&node) == Some(&session) {
                    self.sessions.remove(&node);
                }
                self.dropped.insert(session);
            }
            Action::Tell {
                client,
                event,
                last,
            } => self.told.push((client, *event, last)),
            Action::Log { .. } => {}
        }
    }

    /// Orders since the last call, without Welcome, Alive and Listen.
    pub fn take_orders(&mut self) -> Vec<Order> {
        let orders = std::mem::take(&mut self.orders).into_iter();
        orders
            .filter(|order| {
                !matches!(
                    order.body,
                    ToAgent::Welcome { .. } | ToAgent::Alive | ToAgent::Listen { .. }
                )
            })
            .collect()
    }

    pub fn answer(&mut self, order: &Order, body: FromAgent) {
        self.input(Input::Message {
            node: order.node.clone(),
            session: order.session,
            frame: Frame {
                request: order.request,
                term: order.term,
                body,
            },
        });
    }

    pub fn event(&mut self, name: &str, body: FromAgent) {
        let session = self.sessions[&node(name)];
        let number = match body {
            FromAgent::Heartbeat { .. } if self.numbered => 1 + self.now.0,
            _ => 0,
        };
        self.input(Input::Message {
            node: node(name),
            session,
            frame: Frame {
                request: RequestId(number),
                term: self.machine.term(),
                body,
            },
        });
    }

    /// Answers every order as a healthy agent would, until none is left; orders that `keep` picks
    /// are not answered but returned.
    pub fn pump(&mut self, keep: impl Fn(&Order) -> bool) -> Vec<Order> {
        let mut kept = Vec::new();
        loop {
            let orders = self.take_orders();
            if orders.is_empty() {
                return kept;
            }
            for order in orders {
                if keep(&order) {
                    kept.push(order);
                    continue;
                }
                for body in healthy(&order) {
                    self.answer(&order, body);
                }
            }
        }
    }

    /// Time goes on to the next deadline or to `until`, whichever is first; every connected agent
    /// sends its heartbeats meanwhile.
    pub fn advance(&mut self, milliseconds: u64) {
        let until = self.now.after(milliseconds);
        while self.now < until {
            let beat_ms = self.settings.heartbeat_ms;
            let heartbeat = Millis((self.now.0 / beat_ms + 1) * beat_ms);
            let deadline = self.machine.next_deadline().unwrap_or(until);
            self.now = deadline.max(self.now).min(heartbeat).min(until);
            let nodes: Vec<NodeName> = self.sessions.keys().cloned().collect();
            if self.now == heartbeat {
                for name in nodes {
                    self.event(name.as_str(), FromAgent::Heartbeat { free_bytes: 1 });
                }
            }
            self.input(Input::Tick);
        }
    }

    pub fn ask(&mut self, request: Request) -> ClientId {
        self.ask_as(0, request)
    }

    pub fn ask_as(&mut self, uid: u32, request: Request) -> ClientId {
        self.next_client += 1;
        let client = ClientId(self.next_client);
        self.input(Input::Asked {
            client,
            caller: owner(uid),
            privileged: uid == 0,
            request,
        });
        client
    }

    pub fn events(&self, client: ClientId) -> Vec<&Event> {
        let told = self.told.iter().filter(|(of, ..)| *of == client);
        told.map(|(_, event, _)| event).collect()
    }

    /// The last event, if the command was answered to the end.
    pub fn result(&self, client: ClientId) -> Option<&Event> {
        let told = self
            .told
            .iter()
            .filter(|(of, _, last)| *of == client && *last);
        let last: Vec<_> = told.collect();
        assert!(last.len() <= 1, "a command is answered once: {last:?}");
        last.first().map(|(_, event, _)| event)
    }

    /// Codes of the reports by which a command failed.
    pub fn codes(&self, client: ClientId) -> Vec<&str> {
        match self.result(client) {
            Some(Event::Failed(reports)) => {
                reports.iter().map(|report| report.code.as_str()).collect()
            }
            other => panic!("not failed: {other:?}"),
        }
    }

    pub fn run(&mut self, nodes: &[&str], lease_ms: Option<u64>) -> ClientId {
        let client = self.ask(run(nodes, lease_ms));
        self.pump(|_| false);
        let started = self.result(client);
        assert!(
            matches!(started, Some(Event::JobStarted { .. })),
            "{started:?}"
        );
        client
    }

    /// Takes a checkpoint to its commit.
    pub fn checkpoint(&mut self) -> Epoch {
        let client = self.ask(checkpoint(false));
        self.pump(|_| false);
        match self.result(client) {
            Some(Event::Committed(info)) => info.epoch,
            other => panic!("not committed: {other:?}"),
        }
    }

    pub fn show(&mut self) -> JobInfo {
        let client = self.ask(Request::Show {
            job: "42".parse().unwrap(),
        });
        match self.result(client) {
            Some(Event::Jobs(jobs)) => jobs[0].clone(),
            other => panic!("not shown: {other:?}"),
        }
    }
}

pub fn run(nodes: &[&str], run_lease_ms: Option<u64>) -> Request {
    Request::Run {
        job: "42".parse().unwrap(),
        nodes: nodes.iter().map(|name| node(name)).collect(),
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

pub fn checkpoint(kill: bool) -> Request {
    Request::Checkpoint {
        job: "42".parse().unwrap(),
        adopt: None,
        kill,
        wait: true,
        reset_external_tcp: false,
    }
}

pub fn restart(nodes: &[&str], confirmed_dead: &[&str]) -> Request {
    Request::Restart {
        job: "42".parse().unwrap(),
        epoch: None,
        nodes: nodes.iter().map(|name| node(name)).collect(),
        confirmed_dead: confirmed_dead.iter().map(|name| node(name)).collect(),
        attach: false,
    }
}

/// What a healthy agent answers.
pub fn healthy(order: &Order) -> Vec<FromAgent> {
    match &order.body {
        ToAgent::Start { .. } | ToAgent::Adopt { .. } => vec![FromAgent::Started {
            pid: 1,
            owner: owner(7),
        }],
        ToAgent::Preflight { .. } => vec![FromAgent::Preflighted(Preflight::default())],
        ToAgent::Hold { .. } => vec![FromAgent::Held { freeze_us: 1 }],
        ToAgent::Capture { .. } => vec![FromAgent::Captured(CaptureSummary::default())],
        ToAgent::Release { key, copies, .. } => vec![
            FromAgent::Released { frozen_us: 5 },
            FromAgent::Sealed {
                commit: sealed(key.member, &order.node, copies),
            },
        ],
        ToAgent::Kill { .. } => vec![FromAgent::Killed],
        ToAgent::Build { .. } => vec![FromAgent::Built {
            fetched_bytes: 0,
            filled_bytes: 0,
            replica: None,
        }],
        ToAgent::Check => vec![FromAgent::Checked {
            findings: Vec::new(),
        }],
        ToAgent::RunLease { .. }
        | ToAgent::Forget { .. }
        | ToAgent::Listen { .. }
        | ToAgent::Welcome { .. }
        | ToAgent::Alive => Vec::new(),
        ToAgent::Renew { .. }
        | ToAgent::Abort { .. }
        | ToAgent::Commit { .. }
        | ToAgent::Retire { .. }
        | ToAgent::Signal { .. }
        | ToAgent::Resume { .. } => vec![FromAgent::Done],
    }
}

pub fn sealed(member: MemberId, own: &NodeName, copies: &[CopyTarget]) -> MemberCommit {
    let copies = copies.iter().map(|copy| match copy {
        CopyTarget::Partner { node, .. } => Replica::Node(node.clone()),
        CopyTarget::Shared => Replica::Shared,
    });
    MemberCommit {
        member,
        node: own.clone(),
        manifest: ChunkId([0; 32]),
        replicas: std::iter::once(Replica::Node(own.clone()))
            .chain(copies)
            .collect(),
        raw_bytes: 1,
        stored_bytes: 1,
        freeze_us: 0,
        connections: Vec::new(),
    }
}

/// The member an order is about.
pub fn key_of(order: &Order) -> Option<&MemberKey> {
    match &order.body {
        ToAgent::Start { key, .. }
        | ToAgent::Adopt { key, .. }
        | ToAgent::Preflight { key, .. }
        | ToAgent::Hold { key, .. }
        | ToAgent::Renew { key, .. }
        | ToAgent::Capture { key, .. }
        | ToAgent::Release { key, .. }
        | ToAgent::Abort { key, .. }
        | ToAgent::Kill { key }
        | ToAgent::Build { key, .. }
        | ToAgent::Resume { key }
        | ToAgent::RunLease { key, .. } => Some(key),
        _ => None,
    }
}

pub fn name_of(order: &Order) -> &'static str {
    match order.body {
        ToAgent::Start { .. } => "start",
        ToAgent::Adopt { .. } => "adopt",
        ToAgent::Preflight { .. } => "preflight",
        ToAgent::Hold { .. } => "hold",
        ToAgent::Renew { .. } => "renew",
        ToAgent::Capture { .. } => "capture",
        ToAgent::Release { .. } => "release",
        ToAgent::Abort { .. } => "abort",
        ToAgent::Commit { .. } => "commit",
        ToAgent::Retire { .. } => "retire",
        ToAgent::Kill { .. } => "kill",
        ToAgent::Build { .. } => "build",
        ToAgent::Resume { .. } => "resume",
        ToAgent::RunLease { .. } => "run-lease",
        ToAgent::Forget { .. } => "forget",
        _ => "other",
    }
}

pub fn names(orders: &[Order]) -> Vec<&'static str> {
    orders.iter().map(name_of).collect()
}

pub fn count(orders: &[Order], name: &str) -> usize {
    orders.iter().filter(|order| name_of(order) == name).count()
}

pub fn running(key: &MemberKey) -> MemberState {
    MemberState {
        key: key.clone(),
        ended: None,
        epoch: None,
    }
}

pub fn ended(key: &MemberKey, code: i32) -> FromAgent {
    FromAgent::Ended {
        key: key.clone(),
        status: ExitStatus::Exited(code),
    }
}
