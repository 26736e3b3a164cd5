//! The network lock against real traffic, in network namespaces made for each test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::lock::{Endpoint, NetworkLock, Scope};
use super::sock_diag;
use super::tcp_repair::kick;
use super::test_support::{
    arrives, in_fresh_network, pair, passes, pattern, run_in_user_namespace,
};
use crate::namespace::{Namespace, NamespaceKind, loopback_up};

const LOOPBACKS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];
/// How long nothing may arrive to be taken as blocked: longer than a first retransmission (200 ms).
const BLOCKED: Duration = Duration::from_millis(500);
const ARRIVES: Duration = Duration::from_secs(20);
/// Set for the tests that are run again as a process of their own.
const HELPER: &str = "CRCOORD_LOCK_TEST_NAMESPACE";

#[test]
fn whole_namespace_lock_stops_a_transfer_and_no_byte_is_lost() {
    let name = "whole_namespace_lock_stops_a_transfer_and_no_byte_is_lost";
    for address in LOOPBACKS {
        in_fresh_network(name, |network| {
            let (one, mut other) = pair(address);
            let data = pattern(8 << 20, 7);
            let sender = one.try_clone().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| (&sender).write_all(&data).unwrap());
                let mut received = vec![0; 1 << 20];
                other.read_exact(&mut received).unwrap();

                let lock = NetworkLock::whole_namespace(Some(network.as_fd())).unwrap();
                other.set_read_timeout(Some(BLOCKED)).unwrap();
                let mut rest = Vec::new();
                let blocked = other.read_to_end(&mut rest).unwrap_err();
                assert_eq!(blocked.kind(), std::io::ErrorKind::WouldBlock);
                assert!(
                    received.len() + rest.len() < data.len(),
                    "the transfer was not stopped"
                );
                received.extend(rest);

                drop(lock.unlock().unwrap());
                kick(&one).unwrap();
                other.set_read_timeout(Some(ARRIVES)).unwrap();
                let mut rest = vec![0; data.len() - received.len()];
                other.read_exact(&mut rest).unwrap();
                received.extend(rest);
                assert!(received == data, "bytes differ");
            });
        });
    }
}

#[test]
fn dropping_a_lock_lifts_it() {
    in_fresh_network("dropping_a_lock_lifts_it", |_| {
        let (mut one, mut other) = pair(LOOPBACKS[0]);
        let lock = NetworkLock::whole_namespace(None).unwrap();
        assert!(!passes(&mut one, &mut other, BLOCKED));
        drop(lock);
        assert!(arrives(&mut other, ARRIVES));
    });
}

#[test]
fn two_locks_coexist_and_each_holds_alone() {
    in_fresh_network("two_locks_coexist_and_each_holds_alone", |_| {
        let (mut one, mut other) = pair(LOOPBACKS[0]);
        let first = NetworkLock::whole_namespace(None).unwrap();
        let second = NetworkLock::whole_namespace(None).unwrap();
        assert_ne!(first.table(), second.table());
        drop(first.unlock().unwrap());
        assert!(!passes(&mut one, &mut other, BLOCKED));
        drop(second.unlock().unwrap());
        assert!(arrives(&mut other, ARRIVES));
    });
}

#[test]
fn a_connections_lock_stops_only_what_it_names() {
    let name = "a_connections_lock_stops_only_what_it_names";
    for address in LOOPBACKS {
        in_fresh_network(name, |_| {
            let (mut one, mut other) = pair(address);
            let (mut free_one, mut free_other) = pair(address);
            let listener = TcpListener::bind((address, 0)).unwrap();
            let free_listener = TcpListener::bind((address, 0)).unwrap();
            let job = [one.local_addr(), other.local_addr(), listener.local_addr()];
            let job = job.map(Result::unwrap);
            // The two ends of a connection have different local addresses, and the listener that
            // `other` came from is closed: each address is one socket.
            let sockets = sock_diag::tcp_sockets(None).unwrap();
            let sockets = sockets.iter().filter(|socket| job.contains(&socket.local));
            let both_ways: Vec<_> = sockets.filter_map(Endpoint::of).collect();
            assert_eq!(both_ways.len(), 3, "{both_ways:?}");
            let lock = NetworkLock::connections(None, &both_ways).unwrap();
            assert!(!passes(&mut one, &mut other, BLOCKED), "locked connection");
            assert!(
                passes(&mut free_one, &mut free_other, ARRIVES),
                "other connection"
            );
            assert!(
                passes(&mut free_other, &mut free_one, ARRIVES),
                "other connection"
            );
            let connects = |to: &TcpListener| {
                TcpStream::connect_timeout(&to.local_addr().unwrap(), BLOCKED).is_ok()
            };
            assert!(!connects(&listener), "locked listener");
            assert!(connects(&free_listener), "other listener");
            drop(lock.unlock().unwrap());
            kick(&one).unwrap();
            assert!(arrives(&mut other, ARRIVES));
            assert!(connects(&listener));
        });
    }
}

#[test]
fn a_listener_on_all_addresses_is_locked_for_both_families() {
    in_fresh_network(
        "a_listener_on_all_addresses_is_locked_for_both_families",
        |_| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let connects =
                |ip| TcpStream::connect_timeout(&SocketAddr::new(ip, port), BLOCKED).is_ok();
            assert_eq!(LOOPBACKS.map(connects), [true, true]);
            let local = listener.local_addr().unwrap();
            let lock = NetworkLock::connections(
                None,
                &[Endpoint::Listener {
                    local,
                    v6_only: true,
                }],
            )
            .unwrap();
            assert_eq!(LOOPBACKS.map(connects), [true, false]);
            drop(lock.unlock().unwrap());
            let lock = NetworkLock::connections(
                None,
                &[Endpoint::Listener {
                    local,
                    v6_only: false,
                }],
            )
            .unwrap();
            assert_eq!(LOOPBACKS.map(connects), [false, false]);
            drop(lock.unlock().unwrap());
        },
    );
}

#[test]
fn ten_thousand_connections_and_one() {
    in_fresh_network("ten_thousand_connections_and_one", |_| {
        let (mut one, mut other) = pair(LOOPBACKS[0]);
        let (mut free_one, mut free_other) = pair(LOOPBACKS[0]);
        let mut endpoints: Vec<_> = (0..20_000u32)
            .map(|index| {
                let ip = if index % 2 == 0 {
                    IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + index))
                } else {
                    IpAddr::V6(Ipv6Addr::from(0xfd00 << 112 | u128::from(index)))
                };
                let local = SocketAddr::new(ip, 1000);
                Endpoint::Connection { local, peer: local }
            })
            .collect();
        endpoints.push(Endpoint::Connection {
            local: other.local_addr().unwrap(),
            peer: other.peer_addr().unwrap(),
        });
        let begin = Instant::now();
        let lock = NetworkLock::begin(None, Scope::Endpoints(&endpoints)).unwrap();
        let set = begin.elapsed();
        let lock = lock.wait().unwrap();
        let in_force = begin.elapsed();
        assert!(!passes(&mut one, &mut other, BLOCKED));
        assert!(passes(&mut free_one, &mut free_other, ARRIVES));
        let begin = Instant::now();
        let lifted = lock.unlock().unwrap();
        let unlock = begin.elapsed();
        println!("20001 endpoints: set {set:?}, in force {in_force:?}, unlock {unlock:?}");
        assert!(arrives(&mut other, ARRIVES));
        drop(lifted);
    });
}

#[test]
fn the_probe_says_that_locks_work_here() {
    NetworkLock::supported().expect("the_probe_says_that_locks_work_here");
    in_fresh_network("the_probe_says_that_locks_work_here", |network| {
        for _ in 0..3 {
            let begin = Instant::now();
            let lock = NetworkLock::begin(Some(network.as_fd()), Scope::WholeNamespace).unwrap();
            let set = begin.elapsed();
            let lock = lock.wait().unwrap();
            let in_force = begin.elapsed();
            let begin = Instant::now();
            let lifted = lock.unlock().unwrap();
            let unlock = begin.elapsed();
            drop(lifted);
            let freed = begin.elapsed();
            println!(
                "whole namespace: set {set:?}, in force {in_force:?}, \
                 unlock {unlock:?}, freed {freed:?}"
            );
        }
    });
}

#[test]
fn a_lock_vanishes_when_its_holder_is_killed() {
    in_fresh_network("a_lock_vanishes_when_its_holder_is_killed", |network| {
        let (mut one, mut other) = pair(LOOPBACKS[0]);
        let mut holder = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "net::lock_tests::helper_holds_a_lock_until_killed",
                "--ignored",
            ])
            .arg("--nocapture")
            .env(
                HELPER,
                format!(
                    "/proc/{}/fd/{}",
                    std::process::id(),
                    network.as_fd().as_raw_fd()
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("locked by helper")),
            "no lock was set"
        );
        assert!(!passes(&mut one, &mut other, BLOCKED));
        // Child::kill sends SIGKILL.
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(arrives(&mut other, ARRIVES), "the lock outlived its holder");
    });
}

#[test]
#[ignore = "run by a_lock_vanishes_when_its_holder_is_killed in a process of its own"]
fn helper_holds_a_lock_until_killed() {
    let path = std::env::var_os(HELPER).expect("is a helper of another test");
    let network = Namespace::open(NamespaceKind::Network, path.as_ref()).unwrap();
    let _lock = NetworkLock::whole_namespace(Some(network.as_fd())).unwrap();
    println!("locked by helper");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn locks_work_without_privilege_in_a_user_namespace() {
    run_in_user_namespace(
        "locks_work_without_privilege_in_a_user_namespace",
        "net::lock_tests::helper_locks_in_a_user_namespace",
    );
}

#[test]
#[ignore = "run by locks_work_without_privilege_in_a_user_namespace in a process of its own"]
fn helper_locks_in_a_user_namespace() {
    NetworkLock::supported().unwrap();
    std::thread::spawn(|| {
        loopback_up().unwrap();
        let (mut one, mut other) = pair(LOOPBACKS[0]);
        let lock = NetworkLock::whole_namespace(None).unwrap();
        assert!(!passes(&mut one, &mut other, BLOCKED));
        drop(lock.unlock().unwrap());
        assert!(arrives(&mut other, ARRIVES));
    })
    .join()
    .unwrap();
}
