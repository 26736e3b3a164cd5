//! Control and bulk streams over a real connection, and frames over unix sockets.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use crcoord_transport::{
    BulkStream, ControlStream, FrameError, FrameReader, FrameWriter, Limits, Stream, StreamError,
};
use serde::{Deserialize, Serialize};
use support::Pair;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const MIB: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    number: u64,
    text: String,
}

fn note(number: u64) -> Note {
    Note {
        number,
        text: format!("note {number}"),
    }
}

/// Bytes that repeat nowhere within reach (a linear congruential generator).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.extend_from_slice(&state.to_be_bytes()[..4]);
    }
    bytes.truncate(length);
    bytes
}

async fn control_pair(pair: &Pair) -> (ControlStream, ControlStream) {
    let (ours, theirs) = tokio::join!(
        pair.from_node.open_control(),
        pair.from_coordinator.accept_stream()
    );
    match theirs.unwrap() {
        Stream::Control(theirs) => (ours.unwrap(), theirs),
        Stream::Bulk(_) => panic!("a control stream arrived as a bulk stream"),
    }
}

async fn bulk_pair(pair: &Pair) -> (BulkStream, BulkStream) {
    let header = note(1);
    let (ours, theirs) = tokio::join!(
        pair.from_node.open_bulk(&header),
        pair.from_coordinator.accept_stream()
    );
    match theirs.unwrap() {
        Stream::Bulk(mut theirs) => {
            assert_eq!(theirs.receiver.recv::<Note>().await.unwrap(), Some(header));
            (ours.unwrap(), theirs)
        }
        Stream::Control(_) => panic!("a bulk stream arrived as a control stream"),
    }
}

#[tokio::test]
async fn messages_cross_both_ways_and_end_cleanly() {
    let pair = Pair::new(Limits::control()).await;
    let (mut ours, mut theirs) = control_pair(&pair).await;
    for number in 0..100 {
        ours.sender.send(&note(number)).await.unwrap();
    }
    theirs.sender.send(&note(7)).await.unwrap();
    assert_eq!(ours.receiver.recv::<Note>().await.unwrap(), Some(note(7)));
    let (sender, _receiver) = ours.split();
    let finish = tokio::spawn(sender.finish());
    for number in 0..100 {
        assert_eq!(
            theirs.receiver.recv::<Note>().await.unwrap(),
            Some(note(number))
        );
    }
    assert_eq!(theirs.receiver.recv::<Note>().await.unwrap(), None);
    finish.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_sender_dropped_half_way_is_no_clean_end() {
    let pair = Pair::new(Limits::default()).await;
    let (mut ours, mut theirs) = bulk_pair(&pair).await;
    ours.sender.send(&note(2)).await.unwrap();
    assert_eq!(theirs.receiver.recv::<Note>().await.unwrap(), Some(note(2)));
    drop(ours.sender);
    let error = theirs.receiver.recv::<Note>().await.unwrap_err();
    assert!(matches!(error, FrameError::Io(_)), "{error}");
    let error = theirs.receiver.recv::<Note>().await.unwrap_err();
    assert!(matches!(error, FrameError::OutOfStep), "{error}");
}

#[tokio::test]
async fn a_lost_connection_is_named_with_the_peer() {
    let pair = Pair::new(Limits::default()).await;
    pair.from_coordinator.close(300, "maintenance");
    pair.from_node.closed().await;
    let error = pair.from_node.accept_stream().await.unwrap_err();
    assert!(matches!(error, StreamError::Lost { .. }), "{error}");
    for part in [
        "crcoord://alpha/coordinator/c1",
        "127.0.0.1",
        "maintenance",
        "300",
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn sixty_four_mebibytes_arrive_bit_identical() {
    let pair = Pair::new(Limits::default()).await;
    let (mut ours, mut theirs) = bulk_pair(&pair).await;
    let data = noise(64 * MIB);
    let copy = data.clone();
    let send = tokio::spawn(async move {
        // Bodies of uneven lengths, copied and not copied, each behind a message with its length.
        let mut rest = bytes::Bytes::from(copy);
        let mut length = 1;
        while !rest.is_empty() {
            let body = rest.split_to(length.min(rest.len()));
            ours.sender.send(&note(body.len() as u64)).await.unwrap();
            match length % 2 {
                0 => ours.sender.send_body(&body).await.unwrap(),
                _ => ours.sender.send_body_bytes(body).await.unwrap(),
            }
            length = length * 3 % (5 * MIB) + 1;
        }
        ours.sender.finish().await.unwrap();
        ours.receiver
    });
    let (mut got, mut body) = (Vec::with_capacity(data.len()), Vec::new());
    while let Some(note) = theirs.receiver.recv::<Note>().await.unwrap() {
        theirs
            .receiver
            .recv_body(note.number, &mut body)
            .await
            .unwrap();
        got.extend_from_slice(&body);
    }
    send.await.unwrap();
    // Large packets were found to pass and kept on passing (see `limits::LARGEST_MTU`).
    let mtu = pair.from_node.statistics().path.current_mtu;
    assert!(mtu > 6000, "path MTU is {mtu}");
    assert!(
        got == data,
        "{} of {} bytes came, or they differ",
        got.len(),
        data.len()
    );
}

#[tokio::test]
async fn a_stuck_bulk_reader_does_not_stop_control() {
    let limits = Limits {
        stream_window: 64 << 10,
        connection_window: 2 * 4 * (64 << 10),
        max_streams: 4,
        ..Limits::default()
    };
    let pair = Pair::new(limits).await;
    let (mut ours, mut theirs) = control_pair(&pair).await;
    let mut stuck = Vec::new();
    let mut writers = Vec::new();
    for _ in 0..3 {
        let (mut ours, theirs) = bulk_pair(&pair).await;
        stuck.push(theirs);
        writers.push(tokio::spawn(async move {
            let body = vec![7; 4 * MIB];
            ours.sender.send_body(&body).await
        }));
    }
    // Each round trip lets the writers run into their windows further.
    for number in 0..200 {
        ours.sender.send(&note(number)).await.unwrap();
        let got = tokio::time::timeout(Duration::from_secs(10), theirs.receiver.recv::<Note>());
        assert_eq!(
            got.await.expect("control is starved").unwrap(),
            Some(note(number))
        );
    }
    assert!(writers.iter().all(|writer| !writer.is_finished()));
    // The fifth stream has to wait until one is over, and then opens.
    let header = note(5);
    let mut fifth = pin!(pair.from_node.open_bulk(&header));
    assert!(
        tokio::time::timeout(Duration::from_millis(100), &mut fifth)
            .await
            .is_err()
    );
    drop(stuck);
    for writer in writers {
        assert!(
            writer.await.unwrap().is_err(),
            "the reader was dropped before the end"
        );
    }
    fifth.await.unwrap();
}

#[tokio::test]
async fn oversize_bodies_and_messages_are_refused_on_both_sides() {
    let limits = Limits {
        max_frame: 1000,
        max_body: 1000,
        ..Limits::default()
    };
    let pair = Pair::new(limits).await;
    let (mut ours, mut theirs) = bulk_pair(&pair).await;
    let error = ours.sender.send_body(&[0; 1001]).await.unwrap_err();
    assert!(
        matches!(
            error,
            FrameError::TooLargeToSend {
                length: 1001,
                limit: 1000
            }
        ),
        "{error}"
    );
    let error = ours.sender.send(&"x".repeat(1000)).await.unwrap_err();
    assert!(
        matches!(error, FrameError::TooLargeToSend { .. }),
        "{error}"
    );
    // Neither has put the stream out of step.
    ours.sender.send(&note(3)).await.unwrap();
    assert_eq!(theirs.receiver.recv::<Note>().await.unwrap(), Some(note(3)));
    let mut body = Vec::new();
    let error = theirs
        .receiver
        .recv_body(u64::MAX, &mut body)
        .await
        .unwrap_err();
    assert!(matches!(error, FrameError::TooLarge { .. }), "{error}");
    assert_eq!(body.capacity(), 0, "refused before allocation");
}

#[tokio::test]
async fn an_oversize_frame_is_refused_before_allocation() {
    let (mut raw, theirs) = UnixStream::pair().unwrap();
    let mut reader = FrameReader::with_limit(theirs, 1000);
    raw.write_all(&1001_u32.to_le_bytes()).await.unwrap();
    // No byte of the body is there or will come: the length alone decides.
    let error = reader.recv::<Note>().await.unwrap_err();
    assert!(
        matches!(
            error,
            FrameError::TooLarge {
                length: 1001,
                limit: 1000
            }
        ),
        "{error}"
    );
    let error = reader.recv::<Note>().await.unwrap_err();
    assert!(matches!(error, FrameError::OutOfStep), "{error}");
}

#[tokio::test]
async fn a_cancelled_recv_loses_no_byte() {
    let (mut raw, theirs) = UnixStream::pair().unwrap();
    let mut reader = FrameReader::new(theirs);
    let mut bytes = Vec::new();
    for number in 0..3 {
        crcoord_common::wire::frame::append(&note(number), 1000, &mut bytes).unwrap();
    }
    let mut got = Vec::new();
    for byte in bytes {
        raw.write_all(&[byte]).await.unwrap();
        // A `recv` that reads what is there and is then dropped, as by a lost branch of `select!`.
        tokio::select! {
            biased;
            message = reader.recv::<Note>() => got.push(message.unwrap().unwrap()),
            () = tokio::time::sleep(Duration::from_millis(1)) => {}
        }
    }
    assert_eq!(got, [note(0), note(1), note(2)]);
    drop(raw);
    assert_eq!(reader.recv::<Note>().await.unwrap(), None);
}

#[tokio::test]
async fn a_cancelled_send_keeps_the_stream_in_step() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut writer, mut reader) = (FrameWriter::new(ours), FrameReader::new(theirs));
    let large = "x".repeat(8 * MIB); // more than a socket holds
    assert!(cut_short(writer.send(&large)).await);
    let read = tokio::spawn(async move {
        let first = reader.recv::<String>().await.unwrap();
        (first, reader.recv::<Note>().await.unwrap())
    });
    writer.send(&note(9)).await.unwrap();
    let (first, second) = read.await.unwrap();
    assert!(first.as_deref() == Some(large.as_str()));
    assert_eq!(second, Some(note(9)));
}

#[tokio::test]
async fn a_cancelled_body_is_refused_further_use_on_both_sides() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut writer, mut reader) = (FrameWriter::new(ours), FrameReader::new(theirs));
    let large = vec![1; 8 * MIB];
    assert!(cut_short(writer.send_body(&large)).await);
    assert!(matches!(
        writer.send(&note(1)).await,
        Err(FrameError::OutOfStep)
    ));
    let mut body = Vec::new();
    let limit = 16 * MIB as u32;
    assert!(cut_short(reader.recv_body(large.len(), limit, &mut body)).await);
    assert!(
        !body.is_empty(),
        "something must have moved for this test to mean anything"
    );
    let next = tokio::time::timeout(Duration::from_secs(5), reader.recv::<Note>()).await;
    assert!(
        matches!(next, Ok(Err(FrameError::OutOfStep))),
        "bytes of the body were taken for a message: {next:?}"
    );
}

#[tokio::test]
async fn an_end_inside_a_frame_is_told_from_a_clean_end() {
    let (mut raw, theirs) = UnixStream::pair().unwrap();
    let mut reader = FrameReader::new(theirs);
    let frame = crcoord_common::wire::frame::encode(&note(1), 1000).unwrap();
    raw.write_all(&frame[..frame.len() - 1]).await.unwrap();
    drop(raw);
    let error = reader.recv::<Note>().await.unwrap_err();
    assert!(matches!(error, FrameError::Truncated), "{error}");
}

#[tokio::test]
async fn frames_and_bodies_mix_with_the_blocking_side() {
    use crcoord_common::wire::frame;
    use std::io::Write;

    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let engine = std::thread::spawn(move || {
        let mut ours = ours;
        frame::write(&mut ours, &note(5), 1000).unwrap();
        ours.write_all(b"12345").unwrap();
        frame::write(&mut ours, &note(6), 1000).unwrap();
        frame::read::<Note>(&mut ours, 1000).unwrap()
    });
    let (read, write) = UnixStream::from_std(theirs).unwrap().into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    assert_eq!(reader.recv::<Note>().await.unwrap(), Some(note(5)));
    let mut body = Vec::new();
    reader.recv_body(5, 5, &mut body).await.unwrap();
    assert_eq!(body, b"12345");
    assert_eq!(reader.recv::<Note>().await.unwrap(), Some(note(6)));
    writer.send(&note(8)).await.unwrap();
    assert_eq!(
        tokio::task::spawn_blocking(|| engine.join())
            .await
            .unwrap()
            .unwrap(),
        Some(note(8))
    );
}

#[tokio::test]
async fn a_cancelled_accept_loses_no_stream() {
    let pair = Pair::new(Limits::default()).await;
    assert!(cut_short(pair.from_coordinator.accept_stream()).await);
    let (mut ours, mut theirs) = control_pair(&pair).await;
    ours.sender.send(&note(1)).await.unwrap();
    assert_eq!(theirs.receiver.recv::<Note>().await.unwrap(), Some(note(1)));
}

/// Drives a future that cannot end by itself for a while and drops it; false if it did end.
async fn cut_short<F: Future>(future: F) -> bool {
    tokio::time::timeout(Duration::from_millis(50), future)
        .await
        .is_err()
}
