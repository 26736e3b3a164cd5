//! Two sides of a cluster test: an endless stream of numbered messages both ways, not one lost or doubled.
//!
//! `--listen ADDRESS:PORT` is one side, `--connect ADDRESS:PORT` the other; without either the program is
//! both. A side that sees go sends an end marker with its counts; the other confirms what it
//! received up to there. Each side ends after it was confirmed and has confirmed.
//!
//! A message is a header of four words (kind, number, length, digest of the payload) and its payload.

use std::io::{BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crcoord_zoo::pattern::{FNV_START, fnv1a, word};
use crcoord_zoo::processes::{self, Child, End};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal, pattern};

const DATA: u64 = 1;
/// The sender's counts: no data follows.
const FINISH: u64 = 2;
/// The receiver's counts: no message follows.
const CONFIRM: u64 = 3;
const MOST: u64 = 100_000;
const ATTEMPTS: u32 = 3000;

/// What was sent or received: messages, payload bytes, digest over all payload digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    messages: u64,
    bytes: u64,
    digest: u64,
}

pub fn run(stage: &Stage) -> Outcome {
    match (stage.flag("listen"), stage.flag("connect")) {
        (Some(address), None) => {
            let listener = TcpListener::bind(address).explain(format!("listen on {address}"))?;
            let (stream, _) = listener.accept().explain("accept")?;
            drop(listener);
            side(stage, stream, 121, || stage.ready())
        }
        (None, Some(address)) => side(stage, connect(address)?, 122, || stage.ready()),
        (None, None) => {
            let (near, far) = crcoord_zoo::sockets::tcp_pair().explain("connecting")?;
            let child = Child::spawn(stage, "far side", |gate| {
                processes::close_inherited(&near)?;
                gate.open()?;
                side(stage, far, 122, || Ok(())).map(|()| 0)
            })?;
            side(stage, near, 121, || stage.ready())?;
            child.expect(End::Exited(0))
        }
        (Some(_), Some(_)) => Err(Failure::new("--listen and --connect exclude each other")),
    }
}

fn connect(address: &str) -> Outcome<TcpStream> {
    let mut attempt = 0;
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                attempt += 1;
                ensure!(attempt < ATTEMPTS, "connect to {address}: {error}");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// One side: says hello, then sends and receives with a thread each.
fn side(
    stage: &Stage,
    stream: TcpStream,
    seed: u64,
    standing: impl FnOnce() -> Outcome,
) -> Outcome {
    { &stream }
        .write_all(&seed.to_le_bytes())
        .explain("hello")?;
    let mut theirs = [0; 8];
    { &stream }.read_exact(&mut theirs).explain("hello")?;
    let theirs = u64::from_le_bytes(theirs);
    ensure_equal!(seed + theirs, 121 + 122, "the two sides");
    let (received, to_confirm) = mpsc::channel();
    let (sent, confirmed) = thread::scope(|scope| {
        let sender = scope.spawn(|| send(stage, &stream, seed, to_confirm));
        let receiver = scope.spawn(|| {
            let outcome = receive(&stream, theirs, received);
            if outcome.is_err() {
                // Ends the own sender and the other side. Nothing is lost if it is closed already.
                let _ = stream.shutdown(Shutdown::Both);
            }
            outcome
        });
        let outcome = standing();
        let panicked = |_| Err(Failure::new("panicked"));
        let sent = sender.join().unwrap_or_else(panicked).explain("sender");
        let confirmed = receiver.join().unwrap_or_else(panicked).explain("receiver");
        outcome?;
        // The receiver's failure is the better explanation: it sees what went wrong on the wire.
        let confirmed = confirmed?;
        Ok((sent?, confirmed))
    })?;
    ensure_equal!(confirmed, sent, "what the other side received of ours");
    println!(
        "sent {} messages, {} bytes: all confirmed",
        sent.messages, sent.bytes
    );
    Ok(())
}

/// Sends until go, then the own counts, and at last what was received; returns what was sent.
fn send(
    stage: &Stage,
    stream: &TcpStream,
    seed: u64,
    to_confirm: mpsc::Receiver<Counts>,
) -> Outcome<Counts> {
    let mut output = BufWriter::with_capacity(1 << 16, stream);
    let mut sent = Counts {
        messages: 0,
        bytes: 0,
        digest: FNV_START,
    };
    while !stage.go_seen() {
        let number = sent.messages;
        let payload = pattern::bytes(seed ^ word(seed, number), 0, length_of(seed, number));
        let digest = fnv1a(FNV_START, &payload);
        header(&mut output, [DATA, number, payload.len() as u64, digest])?;
        output.write_all(&payload).explain("send")?;
        sent.messages += 1;
        sent.bytes += payload.len() as u64;
        sent.digest = fnv1a(sent.digest, &digest.to_le_bytes());
    }
    header(
        &mut output,
        [FINISH, sent.messages, sent.bytes, sent.digest],
    )?;
    output.flush().explain("send")?;
    // The other side may see its go much later; its receiver tells us when it has finished.
    let theirs = to_confirm
        .recv()
        .explain("the receiver ended before the end marker")?;
    header(
        &mut output,
        [CONFIRM, theirs.messages, theirs.bytes, theirs.digest],
    )?;
    output.flush().explain("send")?;
    Ok(sent)
}

/// Receives and checks until the other side's confirmation, which it returns.
fn receive(stream: &TcpStream, seed: u64, received: mpsc::Sender<Counts>) -> Outcome<Counts> {
    let mut input = BufReader::with_capacity(1 << 16, stream);
    let mut counts = Counts {
        messages: 0,
        bytes: 0,
        digest: FNV_START,
    };
    let mut finished = false;
    loop {
        let mut words = [0_u64; 4];
        for word in &mut words {
            let mut bytes = [0; 8];
            input
                .read_exact(&mut bytes)
                .explain(format!("after {} messages", counts.messages))?;
            *word = u64::from_le_bytes(bytes);
        }
        let [kind, first, second, third] = words;
        match kind {
            DATA => {
                ensure!(!finished, "data after the end marker");
                ensure_equal!(first, counts.messages, "number of the message");
                let length = length_of(seed, first);
                ensure_equal!(second, length as u64, "length of message {first}");
                let mut payload = vec![0; length];
                input
                    .read_exact(&mut payload)
                    .explain(format!("payload of message {first}"))?;
                let digest = fnv1a(FNV_START, &payload);
                ensure_equal!(digest, third, "digest of message {first}");
                counts.messages += 1;
                counts.bytes += second;
                counts.digest = fnv1a(counts.digest, &digest.to_le_bytes());
            }
            FINISH => {
                let theirs = Counts {
                    messages: first,
                    bytes: second,
                    digest: third,
                };
                ensure_equal!(counts, theirs, "what arrived against what was sent");
                finished = true;
                received.send(counts).explain("the sender has ended")?;
            }
            CONFIRM => {
                ensure!(finished, "a confirmation before the end marker");
                return Ok(Counts {
                    messages: first,
                    bytes: second,
                    digest: third,
                });
            }
            other => {
                let number = counts.messages;
                return Err(Failure::new(format!(
                    "kind {other} after {number} messages"
                )));
            }
        }
    }
}

/// Mostly small, some large: the length follows from the number.
fn length_of(seed: u64, number: u64) -> usize {
    let random = word(seed, number);
    let limit = if random.is_multiple_of(8) { MOST } else { 600 };
    ((random >> 8) % limit) as usize
}

fn header(output: &mut impl Write, words: [u64; 4]) -> Outcome {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    output.write_all(&bytes).explain("send")
}
