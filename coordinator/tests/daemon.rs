//! The daemon with real QUIC, a real socket and a real journal; agents are played.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use crcoord_common::ids::{Epoch, Incarnation};
use crcoord_common::wire::WIRE_VERSION;
use crcoord_common::wire::client::{Event, JobInfo, JobState, Request};
use crcoord_common::wire::control::{FromAgent, ToAgent};
use crcoord_coordinator::{CoordinatorError, Daemon};
use crcoord_transport::Role;
use support::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

async fn agents(site: &Site, running: &Running, names: &[&str]) -> Vec<Agent> {
    let mut agents = Vec::new();
    for name in names {
        agents.push(Agent::start(site, running.address, name, None).await);
    }
    site.connected(names.len()).await;
    agents
}

async fn job(site: &Site) -> JobInfo {
    match site.result(&show()).await {
        Event::Jobs(mut jobs) => jobs.remove(0),
        other => panic!("{other:?}"),
    }
}

fn codes(event: &Event) -> Vec<&str> {
    match event {
        Event::Failed(reports) => reports.iter().map(|report| report.code.as_str()).collect(),
        other => panic!("not failed: {other:?}"),
    }
}

#[tokio::test]
async fn a_job_is_run_checkpointed_and_restarted() {
    let site = Site::new();
    let running = site.start().await;
    let mut agents = agents(&site, &running, &NODES).await;
    let started = site.result(&run(&NODES, None)).await;
    assert!(matches!(started, Event::JobStarted { .. }), "{started:?}");

    let mut asked = site.ask(&checkpoint()).await;
    let mut progress = 0;
    let committed = loop {
        match asked.next().await.unwrap() {
            Event::Progress { .. } => progress += 1,
            Event::Committed(info) => break info,
            Event::Failed(reports) => panic!("{reports:?}"),
            _ => {}
        }
    };
    assert_eq!((committed.epoch, progress), (Epoch(1), 3));
    assert!(
        committed
            .members
            .iter()
            .all(|member| member.freeze_us == 20)
    );
    agents[0].expect("commit").await;

    let Event::Resumed { incarnation, .. } = site.result(&restart(&[])).await else {
        panic!("not resumed");
    };
    assert_eq!(incarnation, Incarnation(2));
    agents[2].expect("kill").await;
    let ToAgent::Build { restore, .. } = agents[2].expect("build").await else {
        unreachable!()
    };
    assert_eq!(restore.part.epoch, Epoch(1));
    agents[2].expect("resume").await;
    assert_eq!(job(&site).await.state, JobState::Running);
    running.stop().await;
}

#[tokio::test]
async fn an_agent_that_vanishes_at_the_hold_aborts_for_all() {
    let site = Site::new();
    let running = site.start().await;
    let mut two = agents(&site, &running, &NODES[..2]).await;
    let third = Agent::start(&site, running.address, "n3", Some(Lapse::Vanish("hold"))).await;
    site.connected(3).await;
    site.result(&run(&NODES, None)).await;
    let failed = site.result(&checkpoint()).await;
    assert_eq!(codes(&failed), ["epoch-aborted", "agent-lost"]);
    two[0].expect("abort").await;
    two[1].expect("abort").await;
    // It comes back with its member held and is told to let it go.
    let mut third = third.reconnect(&site, running.address).await;
    third.expect("abort").await;
    let committed = site.result(&checkpoint()).await;
    assert!(matches!(committed, Event::Committed(info) if info.epoch == Epoch(2)));
    running.stop().await;
}

#[tokio::test]
async fn a_killed_coordinator_comes_back_with_its_journal() {
    let site = Site::new();
    let running = site.start().await;
    let all = agents(&site, &running, &NODES).await;
    site.result(&run(&NODES, None)).await;
    assert!(matches!(
        site.result(&checkpoint()).await,
        Event::Committed(_)
    ));
    running.crash().await;

    let running = site.start().await;
    assert_eq!(job(&site).await.state, JobState::Unknown);
    let mut back = Vec::new();
    for agent in all {
        back.push(agent.reconnect(&site, running.address).await);
    }
    site.connected(3).await;
    let info = job(&site).await;
    assert_eq!((info.state, info.epochs.len()), (JobState::Running, 1));
    let committed = site.result(&checkpoint()).await;
    assert!(matches!(committed, Event::Committed(info) if info.epoch == Epoch(2)));
    let Event::Cluster { term, .. } = site.result(&Request::Status).await else {
        panic!("no status");
    };
    assert_eq!(term, 2);
    running.stop().await;
}

#[tokio::test]
async fn an_epoch_that_was_open_at_the_crash_is_aborted_on_the_agents() {
    let site = Site::new();
    let running = site.start().await;
    let mut held = agents(&site, &running, &["n1"]).await.remove(0);
    // A node that never answers its hold, so that the epoch stays open.
    let silent = Agent::start(&site, running.address, "n2", Some(Lapse::Mute("hold"))).await;
    site.connected(2).await;
    site.result(&run(&["n1", "n2"], None)).await;
    let mut asked = site.ask(&checkpoint()).await;
    held.expect("hold").await;
    while !matches!(asked.next().await, Some(Event::Phase { .. })) {}
    running.crash().await;
    silent.vanish().await;

    let running = site.start().await;
    let mut held = held.reconnect(&site, running.address).await;
    let ToAgent::Abort { epoch, .. } = held.expect("abort").await else {
        unreachable!()
    };
    assert_eq!(epoch, Epoch(1));
    assert!(job(&site).await.epochs.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_lost_node_is_restarted_elsewhere_on_the_operators_word() {
    let site = Site::new();
    let running = site.start().await;
    let mut all = agents(&site, &running, &["n1", "n2", "n3", "n4"]).await;
    site.result(&run(&NODES, None)).await;
    site.result(&checkpoint()).await;
    all.remove(1).vanish().await;
    site.connected(3).await;
    let refused = site.result(&restart(&[])).await;
    assert_eq!(codes(&refused), ["restart-not-proven-dead"]);
    let Event::Resumed { placements, .. } = site.result(&restart(&["n2"])).await else {
        panic!("not resumed");
    };
    let nodes: Vec<String> = placements.iter().map(|at| at.node.to_string()).collect();
    assert_eq!(nodes, ["n1", "n4", "n3"]);
    running.stop().await;
}

#[tokio::test]
async fn run_leases_are_renewed_by_heartbeats() {
    let site = Site::new();
    let running = site.start().await;
    let mut all = agents(&site, &running, &["n1"]).await;
    site.result(&run(&["n1"], Some(10_000))).await;
    for _ in 0..3 {
        let ToAgent::RunLease { lease_ms, .. } = all[0].expect("run-lease").await else {
            unreachable!()
        };
        assert_eq!(lease_ms, 10_000);
    }
    running.stop().await;
}

#[tokio::test]
async fn peers_that_are_not_what_they_say_are_refused_by_name() {
    let site = Site::new();
    let running = site.start().await;
    let hello = |version, node: &str| FromAgent::Hello {
        version,
        node: node.parse().unwrap(),
        bulk: "127.0.0.1:1".parse().unwrap(),
        members: Vec::new(),
        parts: Vec::new(),
        free_bytes: 0,
    };
    let cases = [
        (
            Role::Node,
            "n1",
            hello(WIRE_VERSION + 1, "n1"),
            "wire version",
        ),
        (
            Role::Node,
            "n1",
            hello(WIRE_VERSION, "n2"),
            "its certificate is for",
        ),
        (
            Role::Operator,
            "op",
            hello(WIRE_VERSION, "op"),
            "is no node",
        ),
        (Role::Node, "n1", FromAgent::Done, "is no hello"),
    ];
    for (role, name, hello, expected) in cases {
        let reason = refused(&site, running.address, role, name, hello).await;
        assert!(reason.contains(expected), "{reason}");
    }
    site.connected(0).await;
    running.stop().await;
}

#[tokio::test]
async fn a_second_coordinator_is_refused_and_a_stale_socket_is_not() {
    let site = Site::new();
    let running = site.start().await;
    let second = Daemon::start(site.settings.clone()).await;
    let Err(CoordinatorError::Running { .. }) = second else {
        panic!("started twice");
    };
    running.stop().await;
    std::os::unix::net::UnixListener::bind(socket_of(&site)).unwrap();
    assert!(socket_of(&site).exists(), "a file that nobody listens on");
    site.start().await.stop().await;
}

#[tokio::test]
async fn a_stop_aborts_the_open_epoch_and_says_so() {
    let site = Site::new();
    let running = site.start().await;
    let mut all = agents(&site, &running, &["n1"]).await;
    let silent = Agent::start(&site, running.address, "n2", Some(Lapse::Mute("hold"))).await;
    site.connected(2).await;
    site.result(&run(&["n1", "n2"], None)).await;
    let asked = site.ask(&checkpoint()).await;
    all[0].expect("hold").await;
    let stopping = tokio::spawn(running.stop());
    let failed = asked.result().await;
    assert_eq!(codes(&failed), ["epoch-aborted", "coordinator-stops"]);
    all[0].expect("abort").await;
    stopping.await.unwrap();
    silent.vanish().await;
}

#[tokio::test]
async fn a_request_that_is_none_is_answered_with_a_report() {
    use tokio::io::AsyncWriteExt;
    let site = Site::new();
    let running = site.start().await;
    let mut stream = tokio::net::UnixStream::connect(socket_of(&site))
        .await
        .unwrap();
    stream.write_all(b"\xff\xff\xff\xff").await.unwrap();
    let mut reader = crcoord_transport::FrameReader::new(stream);
    let Some(Event::Failed(reports)) = reader.recv::<Event>().await.unwrap() else {
        panic!("not refused");
    };
    assert_eq!(reports[0].code, "frame-too-large");
    running.stop().await;
}
