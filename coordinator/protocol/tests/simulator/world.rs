//! The seeded world: a coordinator that may crash, nodes that may be lost, connections that delay,
//! repeat and break, a journal that lags.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crcoord_common::ids::{MemberKey, NodeName, RequestId};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::control::{Frame, FromAgent, ToAgent};
use crcoord_common::wire::member::{Command, NetworkMode, Owner, Stdio};
use crcoord_protocol::{
    Action, ClientId, Coordinator, Hello, Input, Millis, Record, Sequence, SessionId, Settings,
};

use crate::agent::{Life, Node};
use crate::ledger::Ledger;
use crate::random::Random;

const MEMBERS: [&str; 3] = ["n1", "n2", "n3"];
const ALL: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];
const RUN_LEASE_MS: u64 = 8_000;

/// One connection: what is under way in both directions, in order.
struct Link {
    session: SessionId,
    to_agent: VecDeque<Frame<ToAgent>>,
    to_coordinator: VecDeque<Frame<FromAgent>>,
}

/// Messages of a connection that the coordinator has given up; the agent may read them for a while.
struct Remains {
    node: NodeName,
    frames: VecDeque<Frame<ToAgent>>,
    until: u64,
}

pub struct World {
    random: Random,
    settings: Settings,
    now: u64,
    machine: Coordinator,
    started: u64,
    journal: Vec<Record>,
    unwritten: VecDeque<(Sequence, Record)>,
    nodes: BTreeMap<NodeName, Node>,
    links: BTreeMap<NodeName, Link>,
    remains: Vec<Remains>,
    ledger: Ledger,
    results: BTreeMap<ClientId, Event>,
    next: u64,
    faults: bool,
    checked: usize,
    commits: usize,
    restarts: usize,
    /// Commits and restarts that came about while there were faults, for the summary.
    pub under_faults: (usize, usize),
}

impl World {
    pub fn new(seed: u64, lease: bool, numbered: bool) -> Self {
        let settings = Settings::new("sim".parse().unwrap());
        let bound_ms = settings.hold_maximum_ms + settings.hold_lease_ms + STEP_MS;
        let ledger = Ledger::new(MEMBERS.len() as u32, bound_ms);
        let mut world = World {
            random: Random(seed),
            machine: Coordinator::recover(settings.clone(), []),
            settings,
            now: 1_000,
            started: 1_000,
            journal: Vec::new(),
            unwritten: VecDeque::new(),
            nodes: ALL
                .iter()
                .map(|name| (name.parse().unwrap(), Node::new(name, numbered)))
                .collect(),
            links: BTreeMap::new(),
            remains: Vec::new(),
            ledger,
            results: BTreeMap::new(),
            next: 0,
            faults: false,
            checked: 0,
            commits: 0,
            restarts: 0,
            under_faults: (0, 0),
        };
        world.machine.begin(Millis(0), world.now / 1000);
        world.carry_out();
        for name in ALL {
            world.connect(&name.parse().unwrap());
        }
        world.settle();
        let started = world.ask_to_the_end(run(lease.then_some(RUN_LEASE_MS)));
        assert!(matches!(started, Event::JobStarted { .. }), "{started:?}");
        let committed = world.ask_to_the_end(checkpoint(false));
        assert!(matches!(committed, Event::Committed(_)), "{committed:?}");
        world.faults = true;
        world
    }

    /// One thing happens.
    pub fn step(&mut self) {
        match self.random.below(100) {
            0..58 => self.deliver_any(),
            58..74 => self.write(),
            74..82 => {
                let pass = self.random.below(STEP_MS);
                self.pass(pass);
            }
            82..89 => self.seal_any(),
            89..94 => self.ask_any(),
            94..99 => self.reconnect_any(),
            _ => self.fault(),
        }
        self.check();
    }

    /// Faults end; everything comes back; then the job must be restartable and checkpointable.
    pub fn recover(&mut self) {
        self.faults = false;
        for node in self.nodes.values_mut() {
            node.up = true;
        }
        for _ in 0..40 {
            for name in ALL {
                self.connect(&name.parse().unwrap());
            }
            self.settle();
            self.pass(5_000);
            self.settle();
        }
        self.check();
        self.under_faults = (self.commits, self.restarts);
        let result = self.ask_to_the_end(restart(Vec::new()));
        assert!(matches!(result, Event::Resumed { .. }), "{result:?}");
        let result = self.ask_to_the_end(checkpoint(false));
        assert!(matches!(result, Event::Committed(_)), "{result:?}");
        self.check();
    }

    fn ask_to_the_end(&mut self, request: Request) -> Event {
        let client = self.ask(request);
        for _ in 0..100 {
            self.settle();
            if let Some(event) = self.results.remove(&client) {
                return event;
            }
            self.pass(1_000);
        }
        panic!("no answer");
    }

    /// Delivers and writes until nothing is under way.
    fn settle(&mut self) {
        loop {
            self.write();
            let names: Vec<NodeName> = self.nodes.keys().cloned().collect();
            let mut moved = false;
            for name in names {
                moved |= self.deliver(&name, true) | self.deliver(&name, false);
                let keys: Vec<MemberKey> = self.nodes[&name].trees.keys().cloned().collect();
                for key in keys {
                    self.seal(&name, &key);
                }
            }
            if !moved && self.unwritten.is_empty() {
                return;
            }
        }
    }

    fn at(&self) -> Millis {
        Millis(self.now - self.started)
    }

    fn input(&mut self, input: Input) {
        self.machine.handle(self.at(), input);
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Persist { sequence, record } => {
                    self.unwritten.push_back((sequence, *record));
                }
                Action::Send {
                    node,
                    session,
                    frame,
                } => {
                    if let Some(link) = self.links.get_mut(&node)
                        && link.session == session
                    {
                        link.to_agent.push_back(*frame);
                    }
                }
                Action::Drop { node, session, .. } => {
                    if self
                        .links
                        .get(&node)
                        .is_some_and(|link| link.session == session)
                    {
                        self.cut(&node);
                    }
                }
                Action::Tell {
                    client,
                    event,
                    last: true,
                } => {
                    if matches!(*event, Event::Resumed { .. }) {
                        self.restarts += 1;
                    }
                    let earlier = self.results.insert(client, *event);
                    assert!(
                        earlier.is_none(),
                        "a command was answered twice: {earlier:?}"
                    );
                }
                Action::Tell { .. } | Action::Log { .. } => {}
            }
        }
    }

    fn write(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        let count = match self.faults {
            true => 1 + self.random.below(self.unwritten.len() as u64) as usize,
            false => self.unwritten.len(),
        };
        let written: Vec<(Sequence, Record)> = self.unwritten.drain(..count).collect();
        let last = written[count - 1].0;
        self.journal
            .extend(written.into_iter().map(|(_, record)| record));
        self.input(Input::Persisted(last));
    }

    fn pass(&mut self, milliseconds: u64) {
        let until = self.now + milliseconds;
        while self.now < until {
            let beat = (self.now / 1_000 + 1) * 1_000;
            self.now = beat.min(until);
            let now = self.now;
            let mut events = Vec::new();
            for (name, node) in self.nodes.iter_mut().filter(|(_, node)| node.up) {
                let told = node.tick(now, &mut self.ledger);
                events.extend(told.into_iter().map(|event| (name.clone(), event)));
                if now == beat && !node.term.eq(&Default::default()) {
                    events.push((name.clone(), FromAgent::Heartbeat { free_bytes: 0 }));
                }
            }
            for (name, event) in events {
                let number = match event {
                    FromAgent::Heartbeat { .. } if self.nodes[&name].numbered => now,
                    _ => 0,
                };
                self.send(&name, RequestId(number), event);
            }
            self.remains.retain(|remains| now < remains.until);
            if !self.faults {
                self.settle();
            }
            self.input(Input::Tick);
        }
    }

    /// An agent's message is under way, if it is connected.
    fn send(&mut self, name: &NodeName, request: RequestId, body: FromAgent) {
        let term = self.nodes[name].term;
        if let Some(link) = self.links.get_mut(name) {
            link.to_coordinator.push_back(Frame {
                request,
                term,
                body,
            });
        }
    }

    fn deliver_any(&mut self) {
        let name = self.random.pick(&ALL).unwrap().parse().unwrap();
        if self.random.once_in(10) {
            self.deliver_remains();
        }
        for _ in 0..self.random.below(12) {
            let to_agent = self.random.once_in(2);
            self.deliver(&name, to_agent);
        }
    }

    /// Delivers the next message of a connection; false when there is none.
    fn deliver(&mut self, name: &NodeName, to_agent: bool) -> bool {
        let Some(link) = self.links.get_mut(name) else {
            return false;
        };
        if to_agent {
            let Some(frame) = link.to_agent.pop_front() else {
                return false;
            };
            self.serve(name, frame, true);
            return true;
        }
        let session = link.session;
        let Some(frame) = link.to_coordinator.pop_front() else {
            return false;
        };
        let times = match self.faults && self.random.once_in(20) {
            true => 2,
            false => 1,
        };
        for _ in 0..times {
            self.input(Input::Message {
                node: name.clone(),
                session,
                frame: frame.clone(),
            });
        }
        true
    }

    fn serve(&mut self, name: &NodeName, frame: Frame<ToAgent>, answer: bool) {
        let now = self.now;
        let fails = self.faults && self.random.once_in(60);
        let may_fail = matches!(
            frame.body,
            ToAgent::Hold { .. }
                | ToAgent::Capture { .. }
                | ToAgent::Release { .. }
                | ToAgent::Build { .. }
                | ToAgent::Resume { .. }
        );
        let Some(node) = self.nodes.get_mut(name) else {
            return;
        };
        let answers = match fails && may_fail {
            true => {
                let report = Report::new("sim-chance", Class::Failure, "chance");
                vec![FromAgent::Failed(report)]
            }
            false => node.serve(now, frame.request, frame.term, frame.body, &mut self.ledger),
        };
        if answer {
            for body in answers {
                self.send(name, frame.request, body);
            }
        }
    }

    /// The agent still reads from a connection that the coordinator has given up.
    fn deliver_remains(&mut self) {
        let Some(remains) = self.remains.first_mut() else {
            return;
        };
        let name = remains.node.clone();
        match remains.frames.pop_front() {
            Some(frame) if self.nodes[&name].up => self.serve(&name, frame, false),
            Some(_) => {}
            None => {
                self.remains.remove(0);
            }
        }
    }

    fn cut(&mut self, name: &NodeName) -> Option<SessionId> {
        let link = self.links.remove(name)?;
        self.remains.push(Remains {
            node: name.clone(),
            frames: link.to_agent,
            // Numbered heartbeats make renewals safe however late they are read.
            until: match self.nodes[name].numbered {
                true => u64::MAX,
                false => self.now + self.settings.heartbeat_timeout_ms,
            },
        });
        Some(link.session)
    }

    fn disconnect(&mut self, name: &NodeName) {
        if let Some(session) = self.cut(name) {
            self.input(Input::Disconnected {
                node: name.clone(),
                session,
            });
        }
    }

    fn connect(&mut self, name: &NodeName) {
        if self.links.contains_key(name) || !self.nodes[name].up {
            return;
        }
        // An agent reads one connection at a time.
        self.remains.retain(|remains| remains.node != *name);
        self.next += 1;
        let session = SessionId(self.next);
        let link = Link {
            session,
            to_agent: VecDeque::new(),
            to_coordinator: VecDeque::new(),
        };
        self.links.insert(name.clone(), link);
        let node = &self.nodes[name];
        let hello = Hello {
            bulk: "10.0.0.1:7117".parse().unwrap(),
            term: node.term,
            members: node.states(),
            parts: Vec::new(),
            free_bytes: 0,
        };
        self.input(Input::Connected {
            node: name.clone(),
            session,
            hello,
        });
    }

    fn reconnect_any(&mut self) {
        let name: NodeName = self.random.pick(&ALL).unwrap().parse().unwrap();
        if !self.nodes[&name].up && self.random.once_in(2) {
            self.nodes.get_mut(&name).unwrap().up = true;
        }
        self.connect(&name);
    }

    fn seal_any(&mut self) {
        let names: Vec<NodeName> = self.nodes.keys().cloned().collect();
        for name in names {
            let keys: Vec<MemberKey> = self.nodes[&name].trees.keys().cloned().collect();
            for key in keys {
                if self.random.once_in(2) {
                    self.seal(&name, &key);
                }
            }
        }
    }

    fn seal(&mut self, name: &NodeName, key: &MemberKey) {
        let node = self.nodes.get_mut(name).unwrap();
        let streaming = node.trees.get(key).and_then(|tree| tree.streaming.clone());
        let Some((_, _, request, term)) = streaming else {
            return;
        };
        if let Some(body) = node.seal(key, &mut self.ledger)
            && let Some(link) = self.links.get_mut(name)
        {
            link.to_coordinator.push_back(Frame {
                request,
                term,
                body,
            });
        }
    }

    fn fault(&mut self) {
        let name: NodeName = self.random.pick(&ALL).unwrap().parse().unwrap();
        let now = self.now;
        match self.random.below(8) {
            0..3 => self.disconnect(&name),
            3 => {
                self.nodes
                    .get_mut(&name)
                    .unwrap()
                    .crash_agent(now, &mut self.ledger);
                self.disconnect(&name);
                self.remains.retain(|remains| remains.node != name);
            }
            4 => {
                self.nodes
                    .get_mut(&name)
                    .unwrap()
                    .crash(now, &mut self.ledger);
                self.disconnect(&name);
                self.remains.retain(|remains| remains.node != name);
            }
            5 => self.crash_coordinator(),
            6 => {
                let node = self.nodes.get_mut(&name).unwrap();
                let keys: Vec<MemberKey> = node.trees.keys().cloned().collect();
                if let Some(key) = self.random.pick(&keys).filter(|_| node.up)
                    && let Some(event) = node.exit(now, key, &mut self.ledger)
                {
                    self.send(&name, RequestId(0), event);
                }
            }
            _ => {
                // A slow network or a stopped clock: nothing is delivered for a while.
                let pass = self.random.below(3 * self.settings.hold_lease_ms);
                self.pass(pass);
            }
        }
    }

    fn crash_coordinator(&mut self) {
        self.unwritten.clear();
        let names: Vec<NodeName> = self.links.keys().cloned().collect();
        for name in names {
            self.cut(&name);
        }
        self.machine = Coordinator::recover(self.settings.clone(), self.journal.clone());
        self.started = self.now;
        self.machine.begin(Millis(0), self.now / 1000);
        self.carry_out();
    }

    fn ask_any(&mut self) {
        let request = match self.random.below(16) {
            0..11 => checkpoint(self.random.once_in(8)),
            11..15 => {
                // An operator looks before he gives his word.
                let down = self.nodes.values().filter(|node| !node.up);
                restart(down.map(|node| node.name.clone()).collect())
            }
            _ => Request::Abort {
                job: "42".parse().unwrap(),
            },
        };
        self.ask(request);
    }

    fn ask(&mut self, request: Request) -> ClientId {
        self.next += 1;
        let client = ClientId(self.next);
        self.input(Input::Asked {
            client,
            caller: Owner {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
            },
            privileged: true,
            request,
        });
        client
    }

    /// The rules that hold after everything that happens.
    fn check(&mut self) {
        for record in &self.journal[self.checked..] {
            if let Record::Commit(epoch) = record {
                self.ledger.check_commit(&epoch.record);
                self.commits += 1;
            }
        }
        self.checked = self.journal.len();
        let mut running = BTreeSet::new();
        for node in self.nodes.values() {
            let lives = node
                .trees
                .iter()
                .filter(|(_, tree)| tree.life == Life::Running);
            running.extend(lives.map(|(key, _)| key.incarnation));
        }
        assert!(
            running.len() <= 1,
            "incarnations {running:?} run at the same time"
        );
    }
}

/// Time that passes in one step, at most.
const STEP_MS: u64 = 1_000;

fn run(run_lease_ms: Option<u64>) -> Request {
    Request::Run {
        job: "42".parse().unwrap(),
        nodes: MEMBERS.iter().map(|name| name.parse().unwrap()).collect(),
        command: Command {
            arguments: vec!["./app".into()],
            environment: BTreeMap::new(),
            directory: "/".into(),
            umask: 0,
        },
        groups: Vec::new(),
        stdio: Stdio::Caller,
        network: NetworkMode::Virtual,
        run_lease_ms,
        attach: false,
    }
}

fn checkpoint(kill: bool) -> Request {
    Request::Checkpoint {
        job: "42".parse().unwrap(),
        adopt: None,
        kill,
        wait: true,
        reset_external_tcp: false,
    }
}

fn restart(confirmed_dead: Vec<NodeName>) -> Request {
    Request::Restart {
        job: "42".parse().unwrap(),
        epoch: None,
        nodes: Vec::new(),
        confirmed_dead,
        attach: false,
    }
}
