//! The cluster of namespaces itself, without daemons: cables work, a lost node is gone with all its
//! processes, and nothing outlives the owner. Needs CAP_SYS_ADMIN and says so.
#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use crcoord::demo::{Cluster, Options};
use crcoord_kernel::namespace::{Namespace, NamespaceKind, in_network_namespace};

fn build(directory: &Path) -> Cluster {
    let nodes = ["n1", "n2"].map(|name| name.parse().unwrap()).to_vec();
    Cluster::build(Options {
        program: env!("CARGO_BIN_EXE_crcoord").into(),
        directory: directory.to_owned(),
        nodes,
        settings: Vec::new(),
        log: "info".to_owned(),
    })
    .expect("this test builds namespaces: run it as root with CAP_SYS_ADMIN")
}

fn socket_on(init: i32, address: &str) -> UdpSocket {
    let namespace = Namespace::of_process(init, NamespaceKind::Network).unwrap();
    let socket = in_network_namespace(namespace.as_fd(), || UdpSocket::bind(address));
    let socket = socket.unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

#[test]
fn nodes_talk_until_their_cable_is_cut_and_end_with_their_owner() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = build(directory.path());
    let (n1, n2) = ("n1".parse().unwrap(), "n2".parse().unwrap());
    let inits = [cluster.init_of(&n1).unwrap(), cluster.init_of(&n2).unwrap()];

    let one = socket_on(inits[0], "10.98.0.2:5000");
    let two = socket_on(inits[1], "10.98.0.3:5000");
    one.send_to(b"hello", "10.98.0.3:5000").unwrap();
    let mut bytes = [0; 8];
    assert_eq!(two.recv(&mut bytes).unwrap(), 5);
    drop(two);

    let host_name = |init: i32| {
        let namespace = Namespace::of_process(init, NamespaceKind::Uts).unwrap();
        let thread = std::thread::spawn(move || {
            namespace.enter().unwrap();
            std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap()
        });
        thread.join().unwrap()
    };
    assert_eq!(host_name(inits[1]).trim(), "n2");

    cluster.lose_node(&n2).unwrap();
    assert!(!Path::new(&format!("/proc/{}", inits[1])).exists());
    assert!(cluster.init_of(&n2).is_none());
    assert!(cluster.lose_node(&n2).is_err(), "it is lost already");
    cluster.check().unwrap();

    drop(cluster);
    assert!(!Path::new(&format!("/proc/{}", inits[0])).exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(&*directory.path().to_string_lossy()),
        "{mounts}"
    );
}

#[test]
fn a_program_that_ends_is_told_with_its_log() {
    let directory = tempfile::tempdir().unwrap();
    // An unknown key in the configuration makes every daemon refuse to start.
    let nodes = vec!["n1".parse().unwrap()];
    let mut cluster = Cluster::build(Options {
        program: env!("CARGO_BIN_EXE_crcoord").into(),
        directory: directory.path().to_owned(),
        nodes: nodes.clone(),
        settings: vec!["agent.wrong = 1".to_owned()],
        log: "info".to_owned(),
    })
    .expect("this test builds namespaces: run it as root with CAP_SYS_ADMIN");
    cluster.start_agent(&nodes[0]).unwrap();
    let error = loop {
        match cluster.check() {
            Err(error) => break error.to_string(),
            Ok(()) => std::thread::yield_now(),
        }
    };
    assert!(
        error.contains("agent on node n1 exited with status 2"),
        "{error}"
    );
    assert!(error.contains("unknown key agent.wrong"), "{error}");
}
