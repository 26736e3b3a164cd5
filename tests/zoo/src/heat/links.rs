//! The connections of a rank to the others.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::rank::Ring;
use super::settings::Settings;
use crate::{Explain, Failure, Outcome, ensure};

/// Attempts to reach a rank that does not listen yet, and the pause between them: five minutes.
pub(super) const ATTEMPTS: u32 = 6000;
pub(super) const PAUSE: Duration = Duration::from_millis(50);
/// The first word of every connection, so that a stray client is refused.
pub(super) const MAGIC: u64 = 0x6372_636f_6865_6174;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    Halo = 1,
    Ring = 2,
    Gather = 3,
}

/// The connections of a rank during the steps.
#[derive(Default)]
pub(super) struct Links {
    pub(super) halo_above: Option<TcpStream>,
    pub(super) halo_below: Option<TcpStream>,
    pub(super) ring: Option<Ring>,
}

impl Links {
    /// Every rank calls the next one (halo and ring; the last one closes the ring) and is called by the one before.
    pub(super) fn connect(settings: &Settings, listener: &TcpListener) -> Outcome<Links> {
        let (rank, ranks) = (settings.rank, settings.ranks());
        let mut links = Links::default();
        if ranks == 1 {
            return Ok(links);
        }
        let (previous, next) = ((rank + ranks - 1) % ranks, (rank + 1) % ranks);
        let ring_out = call(settings, next, Purpose::Ring)?;
        if rank + 1 < ranks {
            links.halo_below = Some(call(settings, next, Purpose::Halo)?);
        }
        let mut ring_in = None;
        while ring_in.is_none() || (rank > 0 && links.halo_above.is_none()) {
            let (stream, purpose, from) = answer(listener)?;
            let place = match purpose {
                Purpose::Ring if from == previous => &mut ring_in,
                Purpose::Halo if rank > 0 && from == previous => &mut links.halo_above,
                _ => return Err(Failure::new(format!("rank {from} called for {purpose:?}"))),
            };
            ensure!(
                place.replace(stream).is_none(),
                "rank {from} called twice for {purpose:?}"
            );
        }
        links.ring = ring_in.map(|previous| Ring {
            previous,
            next: ring_out,
        });
        Ok(links)
    }
}

/// Connects to a rank, again until it listens.
pub(super) fn call(settings: &Settings, rank: usize, purpose: Purpose) -> Outcome<TcpStream> {
    let address = &settings.peers[rank];
    let mut attempt = 0;
    let mut stream = loop {
        match TcpStream::connect(address.as_str()) {
            Ok(stream) => break stream,
            Err(error) => {
                attempt += 1;
                ensure!(attempt < ATTEMPTS, "rank {rank} at {address}: {error}");
                thread::sleep(PAUSE);
            }
        }
    };
    stream.set_nodelay(true).explain("TCP_NODELAY")?;
    for word in [MAGIC, purpose as u64, settings.rank as u64] {
        stream
            .write_all(&word.to_le_bytes())
            .explain(format!("greeting rank {rank}"))?;
    }
    Ok(stream)
}

/// Accepts one connection of another rank.
pub(super) fn answer(listener: &TcpListener) -> Outcome<(TcpStream, Purpose, usize)> {
    let (mut stream, from) = listener.accept().explain("accept")?;
    stream.set_nodelay(true).explain("TCP_NODELAY")?;
    ensure!(read_word(&mut stream)? == MAGIC, "{from} is not a rank");
    let purpose = match read_word(&mut stream)? {
        1 => Purpose::Halo,
        2 => Purpose::Ring,
        3 => Purpose::Gather,
        other => return Err(Failure::new(format!("{from} called for purpose {other}"))),
    };
    let rank = read_word(&mut stream)? as usize;
    Ok((stream, purpose, rank))
}

pub(super) fn read_word(stream: &mut TcpStream) -> Outcome<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).explain("receive")?;
    Ok(u64::from_le_bytes(bytes))
}
