//! Unix socket pairs between parent and child, stream and datagram, with queued data both ways.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixStream};

use crcoord_zoo::processes::{self, Child, End};
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, pattern};

const STREAM: usize = 20_000;
const DATAGRAMS: [usize; 4] = [1, 300, 0, 5000];

pub fn run(stage: &Stage) -> Outcome {
    let (near, far) = UnixStream::pair().explain("socketpair")?;
    let (near_datagrams, far_datagrams) = UnixDatagram::pair().explain("socketpair")?;
    let child = Child::spawn(stage, "child", |gate| {
        processes::close_inherited(&near)?;
        processes::close_inherited(&near_datagrams)?;
        { &far }
            .write_all(&pattern::bytes(142, 0, STREAM))
            .explain("send")?;
        send_datagrams(&far_datagrams, 144)?;
        gate.open()?;
        stage.await_note_after_go("near-has-received")?;
        receive(&far, 141)?;
        receive_datagrams(&far_datagrams, 143)?;
        ensure_equal!(
            { &far }.read(&mut [0; 4]).explain("read")?,
            0,
            "end of the stream"
        );
        Ok(0)
    })?;
    drop((far, far_datagrams));
    { &near }
        .write_all(&pattern::bytes(141, 0, STREAM))
        .explain("send")?;
    send_datagrams(&near_datagrams, 143)?;
    stage.ready()?;
    stage.wait_for_go();

    receive(&near, 142)?;
    receive_datagrams(&near_datagrams, 144)?;
    near.shutdown(Shutdown::Write).explain("shutdown")?;
    stage.note("near-has-received")?;
    child.expect(End::Exited(0))?;
    let gone = near_datagrams.send(b"x").err().map(|error| error.kind());
    ensure_equal!(
        gone,
        Some(std::io::ErrorKind::ConnectionRefused),
        "sending to nobody"
    );
    Ok(())
}

fn receive(mut stream: &UnixStream, seed: u64) -> Outcome {
    let mut found = vec![0; STREAM];
    stream
        .read_exact(&mut found)
        .explain(format!("stream {seed}"))?;
    ensure!(
        found == pattern::bytes(seed, 0, STREAM),
        "wrong bytes in stream {seed}"
    );
    Ok(())
}

fn send_datagrams(socket: &UnixDatagram, seed: u64) -> Outcome {
    for length in DATAGRAMS {
        socket
            .send(&pattern::bytes(seed, 0, length))
            .explain("send a datagram")?;
    }
    Ok(())
}

fn receive_datagrams(socket: &UnixDatagram, seed: u64) -> Outcome {
    for length in DATAGRAMS {
        let mut buffer = vec![0; 8192];
        let count = socket.recv(&mut buffer).explain("receive a datagram")?;
        ensure_equal!(count, length, "length of a datagram of {seed}");
        ensure!(
            buffer[..count] == pattern::bytes(seed, 0, length),
            "wrong datagram of {seed}"
        );
    }
    Ok(())
}
