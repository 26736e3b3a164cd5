//! TCP connections that one side has shut down for writing: with data before the FIN, or already read.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use crcoord_zoo::tasks::eventually;
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, pattern, sockets};

/// From `net/tcp_states.h`.
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
/// More than both queues hold: part of what is taken, and the FIN, stay in the send queue.
const LARGE: usize = 12 << 20;
const SMALL: usize = 10_000;

pub fn run(stage: &Stage) -> Outcome {
    let unread = Pair::new(SMALL, 111)?;
    unread.await_states(FIN_WAIT2, CLOSE_WAIT)?;
    let seen = Pair::new(SMALL, 112)?;
    seen.receive_all()?;
    seen.await_states(FIN_WAIT2, CLOSE_WAIT)?;
    let queued = Pair::large(113)?;
    queued.await_states(FIN_WAIT1, 1)?;
    stage.ready()?;
    stage.wait_for_go();

    unread.receive_all().explain("data before a FIN")?;
    ensure_equal!(
        { &seen.open }.read(&mut [0; 8]).explain("read")?,
        0,
        "a FIN that was seen"
    );
    queued
        .receive_all()
        .explain("data and FIN in the send queue")?;
    for pair in [&unread, &seen, &queued] {
        pair.answer().explain(format!("connection {}", pair.seed))?;
    }
    Ok(())
}

/// A connection whose one side is `shut` for writing; the other one is still open.
struct Pair {
    shut: TcpStream,
    open: TcpStream,
    seed: u64,
    length: usize,
}

impl Pair {
    fn new(length: usize, seed: u64) -> Outcome<Pair> {
        let (shut, open) = sockets::tcp_pair().explain("connecting")?;
        { &shut }
            .write_all(&pattern::bytes(seed, 0, length))
            .explain("send")?;
        shut.shutdown(Shutdown::Write).explain("shutdown")?;
        Ok(Pair {
            shut,
            open,
            seed,
            length,
        })
    }

    /// With a full receive window and more in the send queue, so that the FIN cannot leave.
    fn large(seed: u64) -> Outcome<Pair> {
        let (shut, open) = sockets::tcp_pair().explain("connecting")?;
        shut.set_nonblocking(true).explain("O_NONBLOCK")?;
        let data = pattern::bytes(seed, 0, LARGE);
        let mut length = 0;
        let mut refused = 0;
        while refused < 50 && length < LARGE {
            match { &shut }.write(&data[length..]) {
                Ok(count) => length += count,
                Err(_) => {
                    refused += 1;
                    crcoord_zoo::tasks::pause_briefly();
                }
            }
        }
        ensure!(length < LARGE, "the queues took everything");
        shut.set_nonblocking(false).explain("O_NONBLOCK")?;
        shut.shutdown(Shutdown::Write).explain("shutdown")?;
        ensure!(
            sockets::unacknowledged(&shut).explain("SIOCOUTQ")? > 1,
            "all was acknowledged"
        );
        Ok(Pair {
            shut,
            open,
            seed,
            length,
        })
    }

    fn await_states(&self, shut: u8, open: u8) -> Outcome {
        let state =
            |stream: &TcpStream| sockets::tcp_information(stream).map_or(0, |info| info.tcpi_state);
        eventually(&format!("states {shut} and {open}"), || {
            state(&self.shut) == shut && state(&self.open) == open
        })
    }

    /// The open side receives everything up to the FIN.
    fn receive_all(&self) -> Outcome {
        let mut found = Vec::new();
        { &self.open }.read_to_end(&mut found).explain("receive")?;
        ensure_equal!(found.len(), self.length, "bytes before the FIN");
        let expected = pattern::bytes(self.seed, 0, self.length);
        let difference = pattern::first_difference(&found, &expected);
        ensure_equal!(difference, None, "first wrong byte");
        Ok(())
    }

    /// The open side still sends, the shut one cannot.
    fn answer(&self) -> Outcome {
        let answer = pattern::bytes(self.seed + 10, 0, 100_000);
        let refused = { &self.shut }.write(b"x").err().map(|error| error.kind());
        ensure_equal!(
            refused,
            Some(std::io::ErrorKind::BrokenPipe),
            "sending after shutdown"
        );
        let found = std::thread::scope(|scope| -> Outcome<Vec<u8>> {
            scope.spawn(|| {
                // A failure shows at the receiver, as missing bytes.
                let sent = { &self.open }.write_all(&answer);
                sent.and_then(|()| self.open.shutdown(Shutdown::Write))
            });
            let mut found = Vec::new();
            { &self.shut }
                .read_to_end(&mut found)
                .explain("receive the answer")?;
            Ok(found)
        })?;
        ensure_equal!(
            pattern::first_difference(&found, &answer),
            None,
            "first wrong byte"
        );
        Ok(())
    }
}
