//! TCP connections captured, closed in silence and rebuilt, in network namespaces.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use super::fin::inject_fin;
use super::lock::{Endpoint, NetworkLock};
use super::tcp_repair::{ConnectionState, Queue, TcpRepairError, info, kick};
use super::tcp_state::{Rebuilt, TcpState, tcp_socket};
use super::test_support::{in_fresh_network, pair, passes, pattern, run_in_user_namespace};
use crate::socket_options::{self, BufferSizes};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const TIMEOUT: Duration = Duration::from_secs(30);

/// Captures both ends under a lock, closes them, builds them anew, lifts the lock, resumes them.
fn move_pair(one: TcpStream, other: TcpStream, prepare: impl FnOnce()) -> (TcpStream, TcpStream) {
    let lock = NetworkLock::whole_namespace(None).unwrap();
    prepare();
    let states = capture_both(one, other);
    let built = rebuild_both(&states);
    // A restart that was given up: what was built goes away in silence, and is built again.
    drop(built);
    let (one, other) = rebuild_both(&states);
    drop(lock.unlock().unwrap());
    (resume(one), resume(other))
}

fn capture_both(one: TcpStream, other: TcpStream) -> [TcpState; 2] {
    // Capturing changes nothing: the second look sees the same.
    let first = TcpState::capture(&one).unwrap();
    let states = [&one, &other].map(|stream| TcpState::capture_and_silence(stream).unwrap());
    assert_eq!(
        TcpState {
            timestamp: 0,
            ..first
        },
        TcpState {
            timestamp: 0,
            ..states[0].clone()
        }
    );
    states
}

fn rebuild_both([one, other]: &[TcpState; 2]) -> (Rebuilt, Rebuilt) {
    (
        rebuild(one, Some(other.received_sequence)),
        rebuild(other, Some(one.received_sequence)),
    )
}

fn rebuild(state: &TcpState, peer_received: Option<u32>) -> Rebuilt {
    state
        .rebuild(tcp_socket(state.local.ip()).unwrap(), peer_received)
        .unwrap()
}

fn resume(built: Rebuilt) -> TcpStream {
    let stream = TcpStream::from(built.finish().unwrap());
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// Writes a pattern until the queues take no more; gives what was taken.
fn fill(stream: &mut TcpStream, seed: u64) -> Vec<u8> {
    let mut data = pattern(64 << 20, seed);
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    loop {
        match stream.write(&data[taken..]) {
            Ok(length) => taken += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    data.truncate(taken);
    data
}

/// Checks that exactly `expected` arrives, then a byte written now.
fn assert_receives(from: &mut TcpStream, to: &mut TcpStream, expected: &[u8]) {
    let mut received = vec![0; expected.len()];
    to.read_exact(&mut received).unwrap();
    assert!(received == expected, "bytes differ");
    from.write_all(b"after").unwrap();
    let mut after = [0; 5];
    to.read_exact(&mut after).unwrap();
    assert_eq!(&after, b"after");
}

fn assert_end(stream: &mut TcpStream, expected: &[u8]) {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(
        received == expected,
        "{} bytes, {} expected",
        received.len(),
        expected.len()
    );
}

fn set_sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
}

fn full_queues_both_ways(test: &str, address: IpAddr, sysctls: &[&str]) {
    in_fresh_network(test, |_| {
        for name in sysctls {
            set_sysctl(name, "0");
        }
        let (mut one, mut other) = pair(address);
        let negotiated = info(&one).unwrap();
        let off = |name| sysctls.contains(&name);
        assert_eq!(negotiated.timestamps, !off("tcp_timestamps"));
        assert_eq!(negotiated.sack, !off("tcp_sack"));
        assert_eq!(negotiated.window_scaling, !off("tcp_window_scaling"));
        let (there, back) = (fill(&mut one, 1), fill(&mut other, 2));
        let (mut one, mut other) = move_pair(one, other, || {});
        let after = info(&one).unwrap();
        assert_eq!(
            (
                after.timestamps,
                after.sack,
                after.send_scale,
                after.receive_scale
            ),
            (
                negotiated.timestamps,
                negotiated.sack,
                negotiated.send_scale,
                negotiated.receive_scale
            )
        );
        // Not fixed by the program: the kernel goes on tuning them.
        assert_eq!(BufferSizes::capture(&one).unwrap().locked, 0);
        assert_receives(&mut one, &mut other, &there);
        assert_receives(&mut other, &mut one, &back);
        drop(one);
        assert_end(&mut other, b"");
    });
}

#[test]
fn full_queues_arrive_exactly_once_v4() {
    full_queues_both_ways("full_queues_arrive_exactly_once_v4", V4, &[]);
}

#[test]
fn full_queues_arrive_exactly_once_v6() {
    full_queues_both_ways("full_queues_arrive_exactly_once_v6", V6, &[]);
}

#[test]
fn full_queues_arrive_exactly_once_without_timestamps() {
    let test = "full_queues_arrive_exactly_once_without_timestamps";
    full_queues_both_ways(test, V4, &["tcp_timestamps"]);
}

#[test]
fn full_queues_arrive_exactly_once_without_any_option() {
    let test = "full_queues_arrive_exactly_once_without_any_option";
    full_queues_both_ways(
        test,
        V4,
        &["tcp_timestamps", "tcp_sack", "tcp_window_scaling"],
    );
}

#[test]
fn data_sent_into_the_lock_arrives_exactly_once() {
    in_fresh_network("data_sent_into_the_lock_arrives_exactly_once", |_| {
        let (mut one, mut other) = pair(V4);
        socket_options::set_int(&other, libc::SOL_SOCKET, libc::SO_RCVBUF, 150_000).unwrap();
        let buffers = BufferSizes::capture(&other).unwrap();
        let (there, back) = (pattern(100_000, 3), pattern(70_000, 4));
        one.write_all(&there[..40_000]).unwrap();
        other.read_exact(&mut vec![0; 10_000]).unwrap();
        let (writer, writer_back) = (one.try_clone().unwrap(), other.try_clone().unwrap());
        let (mut one, mut other) = move_pair(one, other, || {
            (&writer).write_all(&there[40_000..]).unwrap();
            (&writer_back).write_all(&back).unwrap();
            drop((writer, writer_back));
        });
        let after = BufferSizes::capture(&other).unwrap();
        assert_eq!(
            (after.receive, after.locked),
            (buffers.receive, buffers.locked)
        );
        assert_receives(&mut one, &mut other, &there[10_000..]);
        assert_receives(&mut other, &mut one, &back);
    });
}

#[test]
fn data_whose_acknowledgement_was_lost_is_not_sent_twice() {
    in_fresh_network(
        "data_whose_acknowledgement_was_lost_is_not_sent_twice",
        |_| {
            let (mut one, other) = pair(V4);
            let (local, peer) = (one.local_addr().unwrap(), one.peer_addr().unwrap());
            let deaf =
                NetworkLock::connections(None, &[Endpoint::Connection { local, peer }]).unwrap();
            let data = pattern(5_000, 5);
            one.write_all(&data).unwrap();
            other.peek(&mut [0]).unwrap();
            let lock = NetworkLock::whole_namespace(None).unwrap();
            let states = capture_both(one, other);
            assert_eq!(states[0].in_flight, data);
            assert_eq!(states[1].unread, data);
            let (one, other) = rebuild_both(&states);
            drop((lock.unlock().unwrap(), deaf.unlock().unwrap()));
            let (mut one, mut other) = (resume(one), resume(other));
            assert_receives(&mut one, &mut other, &data);
            assert_receives(&mut other, &mut one, b"");
        },
    );
}

#[test]
fn ends_of_different_cuts_are_refused() {
    in_fresh_network("ends_of_different_cuts_are_refused", |_| {
        let (one, _other) = pair(V4);
        let state = TcpState::capture(&one).unwrap();
        let ahead = state.acknowledged_sequence.wrapping_add(1);
        let outcome = state.rebuild(tcp_socket(V4).unwrap(), Some(ahead));
        assert!(
            matches!(outcome, Err(TcpRepairError::Inconsistent { .. })),
            "{outcome:?}"
        );
    });
}

#[test]
fn a_half_closed_connection_stays_half_closed() {
    for address in [V4, V6] {
        in_fresh_network("a_half_closed_connection_stays_half_closed", |_| {
            let (mut one, other) = pair(address);
            let data = fill(&mut one, 6);
            one.shutdown(Shutdown::Write).unwrap();
            let (mut one, mut other) = move_pair(one, other, || {});
            assert_end(&mut other, &data);
            assert_eq!(one.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
            other.write_all(b"still open").unwrap();
            other.shutdown(Shutdown::Write).unwrap();
            assert_end(&mut one, b"still open");
        });
    }
}

#[test]
fn a_fin_that_was_received_or_is_under_way_is_seen_once() {
    in_fresh_network(
        "a_fin_that_was_received_or_is_under_way_is_seen_once",
        |_| {
            // The FIN of `one` was received and acknowledged: FIN_WAIT2 and CLOSE_WAIT.
            let (mut one, mut other) = pair(V4);
            one.write_all(b"last words").unwrap();
            one.shutdown(Shutdown::Write).unwrap();
            other.read_exact(&mut [0; 10]).unwrap();
            assert_eq!(other.peek(&mut [0]).unwrap(), 0);
            let late = other.try_clone().unwrap();
            // Under the lock `other` closes too: LAST_ACK, its data and FIN never arrive before.
            let (mut one, mut other) = move_pair(one, other, || {
                (&late).write_all(b"answer").unwrap();
                late.shutdown(Shutdown::Write).unwrap();
                assert_eq!(info(&late).unwrap().state, ConnectionState::LastAck);
                drop(late);
            });
            assert_end(&mut one, b"answer");
            assert_end(&mut other, b"");
        },
    );
}

#[test]
fn both_ends_closing_at_once_see_each_others_data_and_end() {
    in_fresh_network(
        "both_ends_closing_at_once_see_each_others_data_and_end",
        |_| {
            let (one, other) = pair(V4);
            let (first, second) = (one.try_clone().unwrap(), other.try_clone().unwrap());
            let (mut one, mut other) = move_pair(one, other, || {
                for mut stream in [first, second] {
                    stream.write_all(b"bye").unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    assert_eq!(info(&stream).unwrap().state, ConnectionState::FinWait1);
                }
            });
            assert_end(&mut one, b"bye");
            assert_end(&mut other, b"bye");
        },
    );
}

#[test]
fn one_end_is_rebuilt_while_its_peer_lives_on() {
    for address in [V4, V6] {
        in_fresh_network("one_end_is_rebuilt_while_its_peer_lives_on", |_| {
            let (mut one, mut other) = pair(address);
            let there = fill(&mut one, 8);
            other.write_all(b"unread").unwrap();
            one.peek(&mut [0]).unwrap();
            let lock = NetworkLock::whole_namespace(None).unwrap();
            let state = TcpState::capture_and_silence(&one).unwrap();
            assert_eq!(state.unread, b"unread");
            assert!(!state.unsent.is_empty(), "the test is to cover unsent data");
            drop(one);
            let built = rebuild(&state, None);
            drop(lock.unlock().unwrap());
            let mut one = resume(built);
            assert_receives(&mut one, &mut other, &there);
            assert_receives(&mut other, &mut one, b"unread");
        });
    }
}

#[test]
fn a_fin_is_injected_for_a_peer_that_is_gone() {
    for address in [V4, V6] {
        in_fresh_network("a_fin_is_injected_for_a_peer_that_is_gone", |_| {
            let (mut one, other) = pair(address);
            one.write_all(b"testament").unwrap();
            one.shutdown(Shutdown::Write).unwrap();
            let mut received = [0; 9];
            while other.peek(&mut received).unwrap() < received.len() {}
            while info(&other).unwrap().state != ConnectionState::CloseWait {
                std::thread::yield_now();
            }
            let lock = NetworkLock::whole_namespace(None).unwrap();
            let [_, state] = capture_both(one, other);
            assert_eq!(state.state, ConnectionState::CloseWait);
            let built = rebuild(&state, None);
            drop(lock.unlock().unwrap());
            let mut other = resume(built);
            assert_eq!(info(&other).unwrap().state, ConnectionState::Established);
            inject_fin(&state).unwrap();
            assert_end(&mut other, b"testament");
        });
    }
}

#[test]
fn capture_and_kick_change_nothing_for_the_running_program() {
    in_fresh_network(
        "capture_and_kick_change_nothing_for_the_running_program",
        |_| {
            let (mut one, mut other) = pair(V4);
            let reuse = |stream: &TcpStream| {
                socket_options::int(stream.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap()
            };
            // An accepted socket has that of its listener, which is 1 here.
            socket_options::set_int(&one, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
            socket_options::set_int(&other, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
            assert_eq!((reuse(&one), reuse(&other)), (1, 0));
            for stream in [&one, &other] {
                TcpState::capture(stream).unwrap();
                kick(stream).unwrap();
            }
            assert_eq!((reuse(&one), reuse(&other)), (1, 0));
            assert!(passes(&mut one, &mut other, TIMEOUT));
            assert!(passes(&mut other, &mut one, TIMEOUT));
        },
    );
}

#[test]
fn what_cannot_be_captured_is_refused_by_name() {
    in_fresh_network("what_cannot_be_captured_is_refused_by_name", |_| {
        let unconnected = tcp_socket(V4).unwrap();
        let outcome = TcpState::capture(&unconnected);
        let close = ConnectionState::Close;
        assert!(matches!(outcome, Err(TcpRepairError::State { state }) if state == close));
        let listener = std::net::TcpListener::bind((V4, 0)).unwrap();
        let outcome = TcpState::capture(&listener);
        let listen = ConnectionState::Listen;
        assert!(matches!(outcome, Err(TcpRepairError::State { state }) if state == listen));

        let (mut one, other) = pair(V4);
        one.write_all(b"x").unwrap();
        // SAFETY: the pointer and length describe a byte that is only read.
        let sent = unsafe { libc::send(one.as_raw_fd(), b"!".as_ptr().cast(), 1, libc::MSG_OOB) };
        assert_eq!(sent, 1);
        let begin = Instant::now();
        while !matches!(TcpState::capture(&other), Err(TcpRepairError::Urgent)) {
            assert!(
                begin.elapsed() < TIMEOUT,
                "pending urgent data was not noticed"
            );
        }
    });
}

/// A connection whose sender has far more queued than `net.core.wmem_max` permits, and whose
/// receiver more than `rmem_max`: tuned up by the kernel, which obeys other limits.
fn overfull(stream: &TcpStream) -> (TcpState, Vec<u8>) {
    let data = pattern(48 << 20, 9);
    let mut state = TcpState::capture_and_silence(stream).unwrap();
    state.unsent.extend(&data);
    (state, data)
}

#[test]
fn more_than_the_buffer_limits_is_restored_where_permitted() {
    in_fresh_network(
        "more_than_the_buffer_limits_is_restored_where_permitted",
        |_| {
            let (one, mut other) = pair(V4);
            let (mut state, data) = overfull(&one);
            drop(one);
            state.received_sequence = state.received_sequence.wrapping_add(data.len() as u32);
            state.unread.clone_from(&data);
            drop(rebuild(&state, None));
            state.received_sequence = state.received_sequence.wrapping_sub(data.len() as u32);
            state.unread.clear();
            let mut one = resume(rebuild(&state, None));
            assert_receives(&mut one, &mut other, &data);
        },
    );
}

#[test]
fn what_does_not_fit_is_an_error_in_a_user_namespace() {
    let name = "what_does_not_fit_is_an_error_in_a_user_namespace";
    let helper = "net::tcp_tests::helper_that_may_not_enlarge_buffers";
    run_in_user_namespace(name, helper);
}

#[test]
#[ignore = "run by what_does_not_fit_is_an_error_in_a_user_namespace in a process of its own"]
fn helper_that_may_not_enlarge_buffers() {
    in_fresh_network("helper_that_may_not_enlarge_buffers", |_| {
        let (one, _other) = pair(V4);
        let (mut state, data) = overfull(&one);
        drop(one);
        let outcome = rebuild(&state, None).finish();
        let error = outcome.expect_err("48 MiB exceed any usual wmem_max");
        assert!(
            matches!(
                error,
                TcpRepairError::DoesNotFit {
                    queue: Queue::Send,
                    ..
                }
            ),
            "{error}"
        );
        let (one, _other) = pair(V4);
        state = TcpState::capture_and_silence(&one).unwrap();
        drop(one);
        state.unread = data;
        let error = state.rebuild(tcp_socket(V4).unwrap(), None).unwrap_err();
        let receive = Queue::Receive;
        assert!(
            matches!(error, TcpRepairError::DoesNotFit { queue, .. } if queue == receive),
            "{error}"
        );
    });
}
