//! Members: start, output, end, a restart of the agent, terms.

use crcoord_common::ids::Term;
use crcoord_common::report::Class;
use crcoord_common::wire::control::{CaptureOptions, FromAgent, ToAgent};
use crcoord_common::wire::member::ExitStatus;

use crate::cluster::{self, Cluster, Node, shell, soon, spec};
use crate::steps::{alive, epoch, hold, kill, start};

pub async fn a_member_runs() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = cluster::key("1", 1);
    link.tell(ToAgent::Listen {
        key: key.clone(),
        on: true,
    })
    .await;
    start(
        &mut link,
        &key,
        "echo $CRCOORD_JOB $CRCOORD_MEMBER $CRCOORD_NODES; exit 3",
    )
    .await;
    let output = link
        .event(|event| matches!(event, FromAgent::Output { .. }))
        .await;
    assert_eq!(
        output,
        FromAgent::Output {
            key: key.clone(),
            stream: 1,
            bytes: b"1 0 n1,n2\n".to_vec()
        }
    );
    let ended = link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    assert_eq!(
        ended,
        FromAgent::Ended {
            key: key.clone(),
            status: ExitStatus::Exited(3)
        }
    );
    // A request that comes twice is answered twice, and a second life is refused.
    start(&mut link, &key, "exit 4").await;
    link.tell(ToAgent::Forget { key: key.clone() }).await;

    let living = cluster::key("1", 2);
    let pid = start(&mut link, &living, "exec sleep 1000").await;
    assert!(alive(pid));
    let second = ToAgent::Start {
        key: cluster::key("1", 3),
        capsule: spec(),
        command: shell("true"),
    };
    let answer = link.ask(second).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(report.code, "agent-member-alive");
    assert_eq!(report.place.node.as_ref().unwrap().as_str(), "n1");
    assert_eq!(
        link.ask(ToAgent::Signal {
            key: living.clone(),
            signal: 15
        })
        .await,
        FromAgent::Done
    );
    let ended = link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    assert_eq!(
        ended,
        FromAgent::Ended {
            key: living.clone(),
            status: ExitStatus::Signaled(15)
        }
    );
    kill(&mut link, &living).await;
    kill(&mut link, &cluster::key("unknown", 1)).await;
}

pub async fn a_restart() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let (running, ended) = (cluster::key("8", 1), cluster::key("9", 1));
    let pid = start(&mut one.link, &running, "exec sleep 1000").await;
    start(&mut one.link, &ended, "exit 6").await;
    one.link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    hold(
        &mut one.link,
        &running,
        1,
        CaptureOptions::default(),
        60_000,
    )
    .await;
    soon(one.stop()).await;
    assert!(alive(pid));
    let mut one = cluster.agent("n1").await;
    let FromAgent::Hello { members, .. } = &one.link.hello else {
        panic!()
    };
    let mut states: Vec<_> = members
        .iter()
        .map(|member| (member.key.clone(), member.ended, member.epoch))
        .collect();
    states.sort_by(|a, b| a.0.cmp(&b.0));
    let exited = Some(ExitStatus::Exited(6));
    assert_eq!(
        states,
        [(running.clone(), None, None), (ended.clone(), exited, None)]
    );
    one.link.tell(ToAgent::Forget { key: ended }).await;
    // The same member goes on: signals, epochs, its end.
    epoch(
        &mut one.link,
        &running,
        2,
        CaptureOptions::default(),
        vec![],
    )
    .await;
    assert!(matches!(
        one.link.ask(ToAgent::Start {
            key: running.clone(),
            capsule: spec(),
            command: shell("true")
        }).await,
        FromAgent::Started { pid: same, .. } if same == pid
    ));
    kill(&mut one.link, &running).await;
    assert!(!alive(pid));
    one.link.tell(ToAgent::Forget { key: running }).await;
    assert!(matches!(
        one.link.ask(ToAgent::Check).await,
        FromAgent::Checked { .. }
    ));
    one.stop().await;
    let one = cluster.agent("n1").await;
    let FromAgent::Hello { members, .. } = &one.link.hello else {
        panic!()
    };
    assert_eq!(*members, []);
}

/// What ended while no agent ran is told once one runs again, and nothing of it is left.
pub async fn an_end_unseen() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let key = cluster::key("12", 1);
    let pid = start(&mut one.link, &key, "exec sleep 1000").await;
    one.stop().await;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let init: i32 = stat.split(' ').nth(3).unwrap().parse().unwrap();
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains("12-1-0"), "{cgroup}");
    let init = rustix::process::Pid::from_raw(init).unwrap();
    let pidfd = rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
    let mut fds = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();

    let mut one = cluster.agent("n1").await;
    let answer = &one.link.hello;
    let FromAgent::Hello { members, .. } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(
        (members.len(), members[0].ended),
        (1, Some(ExitStatus::Lost))
    );
    let capsules = cluster.settings("n1").run_dir.join("capsules");
    assert_eq!(std::fs::read_dir(capsules).unwrap().count(), 0);
    kill(&mut one.link, &key).await;
    one.link.tell(ToAgent::Forget { key }).await;
}

pub async fn an_older_term() {
    let cluster = Cluster::new();
    let mut one = cluster.agent_with(cluster.settings("n1"), Term(5)).await;
    let checked = one.link.ask(ToAgent::Check).await;
    assert!(
        matches!(checked, FromAgent::Checked { .. }),
        "the welcome has arrived"
    );
    one.link.connection.close(
        crcoord_transport::CLOSE_SHUTDOWN,
        "the test wants a new link",
    );
    let stale = cluster.welcome(Term(4)).await;
    let lost = soon(stale.connection.closed()).await.to_string();
    assert!(lost.contains("term 4") && lost.contains("term 5"), "{lost}");
    let mut fresh = cluster.welcome(Term(6)).await;
    assert!(matches!(
        fresh.ask(ToAgent::Check).await,
        FromAgent::Checked { .. }
    ));
}

pub async fn a_check() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let answer = link.ask(ToAgent::Check).await;
    let FromAgent::Checked { findings } = answer else {
        panic!("{answer:?}")
    };
    assert!(
        findings
            .iter()
            .any(|finding| finding.code == "check-kernel")
    );
    let obstacles: Vec<_> = findings
        .iter()
        .filter(|finding| finding.class == Class::Obstacle)
        .collect();
    assert!(obstacles.is_empty(), "{obstacles:?}");
    assert!(findings.iter().all(|finding| finding.place.node.is_some()));
}
