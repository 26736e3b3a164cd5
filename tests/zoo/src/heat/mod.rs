//! The demo's job: a two-dimensional heat equation solved by several ranks and threads over TCP.
//!
//! Explicit five-point Jacobi steps on a square of `--size` cells with fixed borders, cut into blocks of
//! rows: one block a thread, `--threads` blocks a rank. Each step every block exchanges its edge rows
//! with its neighbours, within a rank through a mailbox and between ranks through TCP. Now and then all
//! ranks agree on the largest change (a maximum, which does not depend on the order) around a ring.
//! At the end rank 0 gathers the field, writes it, and prints its hash. Every cell is computed by the same
//! operations in the same order whatever the number of ranks and threads: the result is equal to the last bit.

use std::net::TcpListener;
use std::process::ExitCode;
use std::thread;

use crate::{Explain, Failure, Outcome};

mod block;
mod gather;
mod links;
mod neighbour;
mod rank;
mod settings;

use block::{Block, Edge};
use gather::gather;
use links::Links;
use neighbour::{Mailbox, Neighbour};
use rank::{REDUCTION, RankWide};
use settings::Settings;

const USAGE: &str = "\
usage: crcoord-heat --size N --steps S [--threads T] [--output FILE] [--progress FILE]
                    --rank R --peers ADDRESS:PORT,ADDRESS:PORT,...
without --rank and --peers: CRCOORD_MEMBER, CRCOORD_ADDRESSES (one address a member) and --port P";

/// The whole program: `crcoord-heat ARGUMENTS`, also inside of other binaries.
pub fn main(arguments: &[String]) -> ExitCode {
    let settings = match Settings::parse(arguments, |name| std::env::var(name).ok()) {
        Ok(settings) => settings,
        Err(failure) => {
            eprintln!("crcoord-heat: {failure}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match solve(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("crcoord-heat: rank {}: {failure}", settings.rank);
            ExitCode::FAILURE
        }
    }
}

fn solve(settings: &Settings) -> Outcome {
    let address = &settings.peers[settings.rank];
    let listener =
        TcpListener::bind(address.as_str()).explain(format!("cannot listen on {address}"))?;
    let links = Links::connect(settings, &listener)?;
    let Links {
        halo_above,
        halo_below,
        ring,
    } = links;
    let rank = RankWide::new(settings, ring);
    let mailboxes: Vec<Mailbox> = (0..2 * settings.threads)
        .map(|_| Mailbox::default())
        .collect();
    let (mailboxes, rank) = (&mailboxes, &rank);

    let (mut above, mut below) = (halo_above, halo_below);
    let blocks = thread::scope(|scope| {
        let mut workers = Vec::new();
        for index in 0..settings.threads {
            // Mailbox 2i carries rows down from thread i to i + 1, mailbox 2i + 1 the other way.
            let up = match (index, above.take()) {
                (0, Some(link)) => Neighbour::Remote {
                    link,
                    sends_first: true,
                },
                (0, None) => Neighbour::Border,
                (_, _) => Neighbour::Local {
                    out: &mailboxes[2 * index - 1],
                    incoming: &mailboxes[2 * index - 2],
                },
            };
            let down = if index + 1 < settings.threads {
                Neighbour::Local {
                    out: &mailboxes[2 * index],
                    incoming: &mailboxes[2 * index + 1],
                }
            } else {
                below
                    .take()
                    .map_or(Neighbour::Border, |link| Neighbour::Remote {
                        link,
                        sends_first: false,
                    })
            };
            let block = Block::new(settings, settings.rank * settings.threads + index);
            workers.push(scope.spawn(move || {
                let result = work(settings, rank, block, up, down);
                if result.is_err() {
                    // The others wait for rows that will never come.
                    rank.give_up();
                    mailboxes.iter().for_each(Mailbox::close);
                }
                result
            }));
        }
        let results: Vec<Outcome<Block>> = workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
            })
            .collect();
        together(results)
    })?;
    gather(settings, &listener, &blocks)
}

/// All blocks, or the reasons of all threads that failed: the first cause is one of them.
fn together(results: Vec<Outcome<Block>>) -> Outcome<Vec<Block>> {
    let (mut blocks, mut reasons) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(block) => blocks.push(block),
            Err(failure) => reasons.push(failure.to_string()),
        }
    }
    match reasons.is_empty() {
        true => Ok(blocks),
        false => Err(Failure::new(reasons.join("; "))),
    }
}

/// All steps of one block.
fn work(
    settings: &Settings,
    rank: &RankWide<'_>,
    mut block: Block,
    mut up: Neighbour<'_>,
    mut down: Neighbour<'_>,
) -> Outcome<Block> {
    for step in 1..=settings.steps {
        up.exchange(&mut block, Edge::Top).explain("halo above")?;
        down.exchange(&mut block, Edge::Bottom)
            .explain("halo below")?;
        let change = block.advance();
        if step % REDUCTION == 0 || step == settings.steps {
            rank.reduce(step, change)?;
        }
    }
    Ok(block)
}
