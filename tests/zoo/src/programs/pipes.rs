//! Pipes: queued content, capacity, packets, blocked writers, half-closed and shared ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::thread;

use crcoord_zoo::processes::{self, Child, End};
use crcoord_zoo::signals::{self, Signals};
use crcoord_zoo::tasks::{await_blocked, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, descriptors, ensure, ensure_equal, pattern};

type Pipe = (OwnedFd, OwnedFd);

const PACKETS: [usize; 4] = [10, 4096, 1, 700];
const LARGE: i32 = 1 << 20;
const STREAM: usize = 400_000;
static SIGPIPES: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SIGPIPES.fetch_add(1, Ordering::SeqCst);
}

pub fn run(stage: &Stage) -> Outcome {
    signals::handle(libc::SIGPIPE, count, 0, &Signals::of(&[])).explain("sigaction")?;
    let (reader, writer) = pipe(0)?;
    let child = Child::spawn(stage, "reading child", |gate| {
        // Only the reading end is left here, so the end of the stream is seen.
        processes::close_inherited(&writer)?;
        gate.open()?;
        stage.await_note_after_go("parent-closed")?;
        expect(&reader, 92, 0, 6000)?;
        ensure!(
            descriptors::read(&reader, 1).explain("read")?.is_empty(),
            "no end of the stream"
        );
        Ok(0)
    })?;
    drop(reader);
    send(&writer, 92, 0, 5000)?;

    let content = content()?;
    let large = large()?;
    let packets = packets()?;
    let writer_gone = half_closed_for_reading()?;
    let (reader_gone_reader, reader_gone) = pipe(0)?;
    drop(reader_gone_reader);
    let copies = Copies::set_up()?;
    let blocked = Blocked::set_up()?;
    stage.ready()?;
    stage.wait_for_go();

    verify_content(content)?;
    verify_large(large)?;
    verify_packets(packets)?;
    expect(&writer_gone, 95, 0, 3000)?;
    ensure!(
        descriptors::read(&writer_gone, 1)
            .explain("read")?
            .is_empty(),
        "no end of file"
    );
    let error = descriptors::write(&reader_gone, b"x")
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_equal!(
        error,
        Some(libc::EPIPE),
        "writing to a pipe without a reader"
    );
    ensure_equal!(SIGPIPES.load(Ordering::SeqCst), 1, "SIGPIPE");
    copies.verify()?;
    blocked.verify()?;
    send(&writer, 92, 5000, 1000)?;
    drop(writer);
    stage.note("parent-closed")?;
    child.expect(End::Exited(0))
}

/// Three writes of different sizes, and a reader that does not block.
fn content() -> Outcome<Pipe> {
    let ends = pipe(libc::O_CLOEXEC)?;
    descriptors::set_nonblocking(&ends.0, true).explain("O_NONBLOCK")?;
    send(&ends.1, 91, 0, 5)?;
    send(&ends.1, 91, 5, 4)?;
    send(&ends.1, 91, 9, 10_000)?;
    Ok(ends)
}

fn verify_content(ends: Pipe) -> Outcome {
    expect(&ends.0, 91, 0, 10_009)?;
    expect_again(&ends.0)?;
    let flags = descriptors::status_flags(&ends.1).explain("F_GETFL")?;
    ensure_equal!(flags & libc::O_NONBLOCK, 0, "O_NONBLOCK of the writing end");
    for end in [&ends.0, &ends.1] {
        let flags = descriptors::control(end, libc::F_GETFD, 0).explain("F_GETFD")?;
        ensure_equal!(flags, libc::FD_CLOEXEC, "close-on-exec");
    }
    Ok(())
}

/// More content than a pipe has room for by default.
fn large() -> Outcome<Pipe> {
    let ends = pipe(libc::O_NONBLOCK)?;
    let size = descriptors::control(&ends.1, libc::F_SETPIPE_SZ, LARGE).explain("F_SETPIPE_SZ")?;
    ensure_equal!(size, LARGE, "size of the large pipe");
    send(&ends.1, 93, 0, 300_001)?;
    Ok(ends)
}

fn verify_large(ends: Pipe) -> Outcome {
    let size = descriptors::control(&ends.0, libc::F_GETPIPE_SZ, 0).explain("F_GETPIPE_SZ")?;
    ensure_equal!(size, LARGE, "size of the large pipe");
    expect(&ends.0, 93, 0, 300_001)?;
    expect_again(&ends.0)
}

/// Packet mode: every read gives one write.
fn packets() -> Outcome<Pipe> {
    let ends = pipe(libc::O_DIRECT | libc::O_NONBLOCK)?;
    let mut start = 0;
    for length in PACKETS {
        send(&ends.1, 94, start, length)?;
        start += length;
    }
    Ok(ends)
}

fn verify_packets(ends: Pipe) -> Outcome {
    let flags = descriptors::status_flags(&ends.1).explain("F_GETFL")?;
    ensure!(
        flags & libc::O_DIRECT != 0,
        "the packet flag of the writing end is gone"
    );
    let mut start = 0;
    for length in PACKETS {
        let found = descriptors::read(&ends.0, 8192).explain("packet")?;
        ensure_equal!(found.len(), length, "length of a packet");
        ensure!(
            found == pattern::bytes(94, start as u64, length),
            "content of a packet"
        );
        start += length;
    }
    expect_again(&ends.0)?;
    send(&ends.1, 94, 0, 3)?;
    send(&ends.1, 94, 3, 3)?;
    ensure_equal!(
        descriptors::read(&ends.0, 100).explain("packet")?.len(),
        3,
        "a new packet"
    );
    Ok(())
}

fn half_closed_for_reading() -> Outcome<OwnedFd> {
    let (reader, writer) = pipe(0)?;
    send(&writer, 95, 0, 3000)?;
    Ok(reader)
}

/// Both ends in several descriptors: the stream ends only with the last one.
struct Copies {
    readers: [OwnedFd; 2],
    writers: [OwnedFd; 2],
}

impl Copies {
    fn set_up() -> Outcome<Copies> {
        let (reader, writer) = pipe(0)?;
        let copy = |end: &OwnedFd| descriptors::duplicate(end, 3, false).explain("F_DUPFD");
        Ok(Copies {
            readers: [copy(&reader)?, reader],
            writers: [copy(&writer)?, writer],
        })
    }

    fn verify(self) -> Outcome {
        let [first_reader, second_reader] = self.readers;
        let [first_writer, second_writer] = self.writers;
        send(&first_writer, 96, 0, 10)?;
        drop(first_writer);
        send(&second_writer, 96, 10, 10)?;
        expect(&first_reader, 96, 0, 15)?;
        drop(first_reader);
        expect(&second_reader, 96, 15, 5)?;
        // Copies share the open file, so a status flag set on one would be seen on both.
        let ready = descriptors::poll(&second_reader, libc::POLLIN, 0).explain("poll")?;
        ensure_equal!(ready, 0, "events of an empty pipe with a writer");
        drop(second_writer);
        ensure!(
            descriptors::read(&second_reader, 1)
                .explain("read")?
                .is_empty(),
            "no end of file"
        );
        Ok(())
    }
}

/// A full pipe and a thread that is blocked in a write to it.
struct Blocked {
    reader: OwnedFd,
    thread: thread::JoinHandle<Outcome>,
}

impl Blocked {
    fn set_up() -> Outcome<Blocked> {
        let (reader, writer) = pipe(0)?;
        let tid = Arc::new(AtomicI32::new(0));
        let its_tid = Arc::clone(&tid);
        let thread = thread::spawn(move || {
            its_tid.store(gettid(), Ordering::SeqCst);
            // In two calls: the pipe is full after the first, the second one blocks at its first byte.
            let size = descriptors::control(&writer, libc::F_GETPIPE_SZ, 0).explain("size")?;
            send(&writer, 97, 0, size as usize)?;
            send(&writer, 97, size as usize, STREAM - size as usize)
        });
        eventually("start of the writer", || tid.load(Ordering::SeqCst) != 0)?;
        let pid = std::process::id() as i32;
        await_blocked(pid, tid.load(Ordering::SeqCst), &[libc::SYS_write])?;
        Ok(Blocked { reader, thread })
    }

    fn verify(self) -> Outcome {
        ensure!(
            !self.thread.is_finished(),
            "the blocked writer is not blocked any more"
        );
        expect(&self.reader, 97, 0, STREAM)?;
        self.thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("the writer panicked")))?;
        ensure!(
            descriptors::read(&self.reader, 1)
                .explain("read")?
                .is_empty(),
            "too many bytes"
        );
        Ok(())
    }
}

fn pipe(flags: i32) -> Outcome<Pipe> {
    descriptors::pipe(flags).explain("pipe2")
}

fn send(end: &OwnedFd, seed: u64, start: usize, length: usize) -> Outcome {
    descriptors::write_all(end, &pattern::bytes(seed, start as u64, length)).explain("write")
}

fn expect(end: &OwnedFd, seed: u64, start: usize, length: usize) -> Outcome {
    let found = descriptors::read_exactly(end, length).explain(format!("stream {seed}"))?;
    let expected = pattern::bytes(seed, start as u64, length);
    let difference = pattern::first_difference(&found, &expected);
    ensure_equal!(
        difference,
        None,
        "first wrong byte of stream {seed} from {start} on"
    );
    Ok(())
}

fn expect_again(end: &OwnedFd) -> Outcome {
    let error = descriptors::read(end, 1)
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_equal!(error, Some(libc::EAGAIN), "reading from an empty pipe");
    Ok(())
}
