//! Established TCP connections between two processes of one tree, with all four queues full.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use crcoord_zoo::processes::{self, Child, End, Gate};
use crcoord_zoo::sockets;
use crcoord_zoo::tasks::{await_blocked, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, descriptors, ensure, ensure_equal, pattern};

/// Bytes of each direction in the end: more than all queues hold.
const STREAM: usize = 12 << 20;
const CHUNK: usize = 64 << 10;

pub fn run(stage: &Stage) -> Outcome {
    let (full_near, full_far) = sockets::tcp_pair().explain("connecting")?;
    let (blocked_near, blocked_far) = sockets::tcp_pair().explain("connecting")?;
    let (quiet_near, quiet_far) = sockets::tcp_pair().explain("connecting")?;
    let child = Child::spawn(stage, "far side", |gate| {
        for near in [&full_near, &blocked_near, &quiet_near] {
            processes::close_inherited(near)?;
        }
        far_side(stage, gate, &full_far, &blocked_far, &quiet_far)
    })?;
    drop((full_far, blocked_far, quiet_far));
    set_options(&full_near)?;
    let side = Side::of(&full_near)?;
    let sent = fill(&full_near, 101)?;
    let (writer, blocked_stream) = blocked_writer(blocked_near)?;
    (&quiet_near)
        .write_all(b"a little from near")
        .explain("send")?;
    eventually("the far side's fill", || stage.noted("far-filled"))?;
    stage.ready()?;
    stage.wait_for_go();

    ensure!(
        !writer.is_finished(),
        "the blocked writer is not blocked any more"
    );
    side.verify(&full_near)?;
    quiet(
        &quiet_near,
        b"a little from far",
        b"near again",
        b"far again",
    )?;
    finish(&full_near, 101, sent, 102)?;
    drain(&blocked_stream, 104)?;
    writer
        .join()
        .unwrap_or_else(|_| Err(Failure::new("the writer panicked")))?;
    child.expect(End::Exited(0))
}

fn far_side(
    stage: &Stage,
    gate: &Gate<'_>,
    full: &TcpStream,
    blocked: &TcpStream,
    quiet_stream: &TcpStream,
) -> Outcome<u8> {
    set_options(full)?;
    let side = Side::of(full)?;
    gate.open()?;
    let sent = fill(full, 102)?;
    { quiet_stream }
        .write_all(b"a little from far")
        .explain("send")?;
    stage.note("far-filled")?;
    stage.wait_for_go();
    side.verify(full)?;
    quiet(
        quiet_stream,
        b"a little from near",
        b"far again",
        b"near again",
    )?;
    finish(full, 102, sent, 101)?;
    drain(blocked, 103)?;
    { blocked }
        .write_all(&pattern::bytes(104, 0, STREAM))
        .explain("send")?;
    blocked.shutdown(Shutdown::Write).explain("shutdown")?;
    Ok(0)
}

/// Options that the restart must bring back, with the value that is set (0: whatever it is).
const OPTIONS: [(i32, i32, i32); 9] = [
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1234),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 77),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 60_000),
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 600_000),
];

fn set_options(stream: &TcpStream) -> Outcome {
    for (level, name, value) in OPTIONS {
        sockets::set_option(stream, level, name, value)
            .explain(format!("setsockopt {level} {name}"))?;
    }
    stream.set_nonblocking(true).explain("O_NONBLOCK")
}

/// What one end must look like afterwards.
#[derive(PartialEq, Eq, Debug)]
struct Side {
    addresses: [std::net::SocketAddr; 2],
    options: Vec<i32>,
    status: i32,
}

impl Side {
    fn of(stream: &TcpStream) -> Outcome<Side> {
        let options = OPTIONS
            .iter()
            .map(|&(level, name, _)| sockets::option(stream, level, name))
            .collect::<std::io::Result<Vec<i32>>>();
        Ok(Side {
            addresses: [
                stream.local_addr().explain("getsockname")?,
                stream.peer_addr().explain("getpeername")?,
            ],
            options: options.explain("getsockopt")?,
            status: descriptors::status_flags(stream).explain("F_GETFL")?,
        })
    }

    fn verify(&self, stream: &TcpStream) -> Outcome {
        ensure_equal!(Side::of(stream)?, *self, "addresses, options and flags");
        ensure!(
            self.status & libc::O_NONBLOCK != 0,
            "O_NONBLOCK was never there"
        );
        Ok(())
    }
}

/// Sends until the queues take nothing any more for a while; returns how much.
fn fill(mut stream: &TcpStream, seed: u64) -> Outcome<usize> {
    let (mut sent, mut refused) = (0, 0);
    // The receiver's window opens while its kernel moves data: full only when it stays full.
    while refused < 100 {
        match stream.write(&pattern::bytes(seed, sent as u64, CHUNK)) {
            Ok(count) => (sent, refused) = (sent + count, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(error) => return Err(error).explain("filling the send queue"),
        }
    }
    ensure!(sent < STREAM, "the queues took the whole stream");
    let unacknowledged = sockets::unacknowledged(stream).explain("SIOCOUTQ")?;
    ensure!(unacknowledged > 0, "nothing is left in the send queue");
    Ok(sent)
}

/// Sends the rest while the other direction is received and checked to its end.
fn finish(stream: &TcpStream, own: u64, sent: usize, theirs: u64) -> Outcome {
    stream.set_nonblocking(false).explain("O_NONBLOCK")?;
    thread::scope(|scope| {
        let sender = scope.spawn(|| -> Outcome {
            let rest = pattern::bytes(own, sent as u64, STREAM - sent);
            { stream }.write_all(&rest).explain("sending the rest")?;
            stream.shutdown(Shutdown::Write).explain("shutdown")
        });
        let received = drain(stream, theirs);
        let sender = sender
            .join()
            .unwrap_or_else(|_| Err(Failure::new("the sender panicked")));
        received.and(sender)
    })
}

/// Receives a whole stream: every byte once, in order, and then the end.
fn drain(mut stream: &TcpStream, seed: u64) -> Outcome {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    loop {
        let count = stream
            .read(&mut buffer)
            .explain(format!("stream {seed} at {at}"))?;
        if count == 0 {
            break;
        }
        let expected = pattern::bytes(seed, at as u64, count);
        if let Some(difference) = pattern::first_difference(&buffer[..count], &expected) {
            return Err(Failure::new(format!(
                "stream {seed}: wrong byte {}",
                at + difference
            )));
        }
        at += count;
    }
    ensure_equal!(at, STREAM, "length of stream {seed}");
    Ok(())
}

/// A connection with a few bytes in both receive queues and nothing to send.
fn quiet(mut stream: &TcpStream, queued: &[u8], say: &[u8], hear: &[u8]) -> Outcome {
    for (part, expected) in [(1, queued), (2, hear)] {
        let mut buffer = vec![0; expected.len()];
        stream
            .read_exact(&mut buffer)
            .explain(format!("quiet connection, part {part}"))?;
        ensure_equal!(buffer, expected, "quiet connection, part {part}");
        if part == 1 {
            stream.write_all(say).explain("quiet connection")?;
        }
    }
    Ok(())
}

type Writer = thread::JoinHandle<Outcome>;

/// A thread blocked in a write of a whole stream, and the same connection for reading.
fn blocked_writer(stream: TcpStream) -> Outcome<(Writer, Arc<TcpStream>)> {
    let stream = Arc::new(stream);
    let its_stream = Arc::clone(&stream);
    let tid = Arc::new(AtomicI32::new(0));
    let its_tid = Arc::clone(&tid);
    let writer = thread::spawn(move || {
        its_tid.store(gettid(), Ordering::SeqCst);
        { &*its_stream }
            .write_all(&pattern::bytes(103, 0, STREAM))
            .explain("blocked writer")?;
        its_stream.shutdown(Shutdown::Write).explain("shutdown")
    });
    eventually("start of the writer", || tid.load(Ordering::SeqCst) != 0)?;
    let calls = [libc::SYS_write, libc::SYS_sendto];
    await_blocked(
        std::process::id() as i32,
        tid.load(Ordering::SeqCst),
        &calls,
    )?;
    Ok((writer, stream))
}
