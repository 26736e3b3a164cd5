//! The demo's job: a two-dimensional heat equation solved by several ranks and threads over TCP.
//!
//! Explicit five-point Jacobi steps on a square of `--size` cells with fixed borders, cut into blocks of
//! rows: one block a thread, `--threads` blocks a rank. Each step every block exchanges its edge rows
//! with its neighbours, within a rank through a mailbox and between ranks through TCP. Now and then all
//! ranks agree on the largest change (a maximum, which does not depend on the order) around a ring.
//! At the end rank 0 gathers the field, writes it, and prints its hash. Every cell is computed by the same
//! operations in the same order whatever the number of ranks and threads: the result is equal to the last bit.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::pattern::{FNV_START, fnv1a};
use crate::{Explain, Failure, Outcome, ensure};

const USAGE: &str = "\
usage: crcoord-heat --size N --steps S [--threads T] [--output FILE] [--progress FILE]
                    --rank R --peers ADDRESS:PORT,ADDRESS:PORT,...
without --rank and --peers: CRCOORD_MEMBER, CRCOORD_ADDRESSES (one address a member) and --port P";

/// Steps between two reductions over all ranks, and between two progress lines.
const REDUCTION: u64 = 64;
/// Attempts to reach a rank that does not listen yet, and the pause between them: five minutes.
const ATTEMPTS: u32 = 6000;
const PAUSE: Duration = Duration::from_millis(50);
/// The first word of every connection, so that a stray client is refused.
const MAGIC: u64 = 0x6372_636f_6865_6174;
/// Largest field: 16384 x 16384 cells are 2 GiB.
const MOST_CELLS: usize = 16384;

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

/// The command line, checked.
#[derive(Debug)]
struct Settings {
    rank: usize,
    peers: Vec<String>,
    size: usize,
    steps: u64,
    threads: usize,
    output: Option<PathBuf>,
    progress: Option<PathBuf>,
}

impl Settings {
    fn parse(
        arguments: &[String],
        environment: impl Fn(&str) -> Option<String>,
    ) -> Outcome<Settings> {
        let known = [
            "rank", "peers", "port", "size", "steps", "threads", "output", "progress",
        ];
        let mut flags = Vec::new();
        for pair in arguments.chunks(2) {
            let [name, value] = pair else {
                return Err(Failure::new(format!("{} has no value", pair[0])));
            };
            let name = name.strip_prefix("--").filter(|name| known.contains(name));
            flags.push((
                name.explain(format!("unknown flag {}", pair[0]))?,
                value.clone(),
            ));
        }
        let flag = |name: &str| {
            flags
                .iter()
                .find(|(flag, _)| *flag == name)
                .map(|(_, value)| value.clone())
        };
        let peers: Vec<String> = match (flag("peers"), environment("CRCOORD_ADDRESSES")) {
            (Some(peers), _) => peers.split(',').map(str::to_owned).collect(),
            (None, Some(addresses)) => {
                let port: u16 = number("--port", flag("port").or(Some("7200".into())))?;
                addresses
                    .split(',')
                    .map(|address| with_port(address, port))
                    .collect()
            }
            (None, None) => return Err(Failure::new("neither --peers nor CRCOORD_ADDRESSES")),
        };
        let settings = Settings {
            rank: number(
                "rank",
                flag("rank").or_else(|| environment("CRCOORD_MEMBER")),
            )?,
            peers,
            size: number("--size", flag("size"))?,
            steps: number("--steps", flag("steps"))?,
            threads: number("--threads", flag("threads").or(Some("2".into())))?,
            output: flag("output").map(PathBuf::from),
            progress: flag("progress").map(PathBuf::from),
        };
        let ranks = settings.peers.len();
        if let Some(members) = environment("CRCOORD_MEMBERS").filter(|_| flag("peers").is_none()) {
            let members: usize = number("CRCOORD_MEMBERS", Some(members))?;
            ensure!(members == ranks, "{members} members but {ranks} addresses");
        }
        ensure!(settings.rank < ranks, "rank {} of {ranks}", settings.rank);
        ensure!(
            (1..=256).contains(&settings.threads),
            "--threads is not in 1..=256"
        );
        let blocks = ranks * settings.threads;
        let sizes = blocks.max(3)..=MOST_CELLS;
        ensure!(
            sizes.contains(&settings.size),
            "--size is not in {sizes:?} for {blocks} blocks"
        );
        Ok(settings)
    }

    fn ranks(&self) -> usize {
        self.peers.len()
    }

    fn blocks(&self) -> usize {
        self.ranks() * self.threads
    }

    /// The first row of a block; block `blocks()` begins behind the last row.
    fn first_row(&self, block: usize) -> usize {
        block * self.size / self.blocks()
    }
}

fn number<T: std::str::FromStr<Err: Display>>(name: &str, text: Option<String>) -> Outcome<T> {
    let text = text.explain(format!("{name} is missing"))?;
    text.parse().explain(format!("{name} {text:?}"))
}

/// `ADDRESS:PORT`, with brackets for IPv6.
fn with_port(address: &str, port: u16) -> String {
    if address.contains(':') && !address.starts_with('[') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
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
        results.into_iter().collect::<Outcome<Vec<Block>>>()
    })?;
    gather(settings, &listener, &blocks)
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

/// The rows of one thread with one more row above and below.
struct Block {
    width: usize,
    first_row: usize,
    rows: usize,
    now: Vec<f64>,
    next: Vec<f64>,
}

#[derive(Clone, Copy)]
enum Edge {
    Top,
    Bottom,
}

impl Block {
    fn new(settings: &Settings, block: usize) -> Block {
        let (width, first_row) = (settings.size, settings.first_row(block));
        let rows = settings.first_row(block + 1) - first_row;
        let mut now = vec![0.0; (rows + 2) * width];
        for row in 0..rows {
            for column in 0..width {
                now[(row + 1) * width + column] = initial(width, first_row + row, column);
            }
        }
        let next = now.clone();
        Block {
            width,
            first_row,
            rows,
            now,
            next,
        }
    }

    /// One Jacobi step; returns the largest change of a cell.
    fn advance(&mut self) -> f64 {
        let width = self.width;
        let mut largest = 0.0_f64;
        for row in 1..=self.rows {
            let field_row = self.first_row + row - 1;
            if field_row == 0 || field_row == width - 1 {
                continue;
            }
            let (above, rest) = self.now[(row - 1) * width..(row + 2) * width].split_at(width);
            let (here, below) = rest.split_at(width);
            let target = &mut self.next[row * width..(row + 1) * width];
            for column in 1..width - 1 {
                let around =
                    (above[column] + below[column]) + (here[column - 1] + here[column + 1]);
                let value = here[column] + 0.2 * (around - 4.0 * here[column]);
                largest = largest.max((value - here[column]).abs());
                target[column] = value;
            }
        }
        std::mem::swap(&mut self.now, &mut self.next);
        largest
    }

    fn edge(&self, edge: Edge) -> &[f64] {
        let row = match edge {
            Edge::Top => 1,
            Edge::Bottom => self.rows,
        };
        &self.now[row * self.width..(row + 1) * self.width]
    }

    fn set_halo(&mut self, edge: Edge, row: &[f64]) {
        let index = match edge {
            Edge::Top => 0,
            Edge::Bottom => self.rows + 1,
        };
        self.now[index * self.width..(index + 1) * self.width].copy_from_slice(row);
    }

    /// The block's own rows as little-endian bytes.
    fn bytes(&self) -> Vec<u8> {
        to_bytes(&self.now[self.width..(self.rows + 1) * self.width])
    }
}

/// Hot at the top, cold elsewhere on the border, uneven inside; exact in f64.
fn initial(size: usize, row: usize, column: usize) -> f64 {
    if row == 0 {
        100.0
    } else if row == size - 1 || column == 0 || column == size - 1 {
        0.0
    } else {
        ((row * 31 + column * 17) % 101) as f64
    }
}

/// Where the rows beyond an edge come from.
enum Neighbour<'a> {
    /// The edge of the field: fixed, no exchange.
    Border,
    /// Another thread of this rank.
    Local {
        out: &'a Mailbox,
        incoming: &'a Mailbox,
    },
    /// Another rank. Of the two ends one sends first, so that two full socket buffers cannot face each other.
    Remote { link: TcpStream, sends_first: bool },
}

impl Neighbour<'_> {
    fn exchange(&mut self, block: &mut Block, edge: Edge) -> Outcome {
        let row = match self {
            Neighbour::Border => return Ok(()),
            Neighbour::Local { out, incoming } => {
                out.put(block.edge(edge).to_vec());
                incoming.take()?
            }
            Neighbour::Remote { link, sends_first } => {
                if *sends_first {
                    link.write_all(&to_bytes(block.edge(edge)))
                        .explain("send")?;
                }
                let mut bytes = vec![0; block.width * 8];
                link.read_exact(&mut bytes).explain("receive")?;
                if !*sends_first {
                    link.write_all(&to_bytes(block.edge(edge)))
                        .explain("send")?;
                }
                to_numbers(&bytes)
            }
        };
        block.set_halo(edge, &row);
        Ok(())
    }
}

/// Rows from one thread to its neighbour. At most two are in it, as both sides go step by step.
#[derive(Default)]
struct Mailbox {
    state: Mutex<(VecDeque<Vec<f64>>, bool)>,
    changed: Condvar,
}

impl Mailbox {
    fn put(&self, row: Vec<f64>) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .push_back(row);
        self.changed.notify_one();
    }

    fn take(&self) -> Outcome<Vec<f64>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(row) = state.0.pop_front() {
                return Ok(row);
            }
            ensure!(!state.1, "the neighbouring thread gave up");
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }
}

/// What the threads of a rank do together: reduce, report.
struct RankWide<'a> {
    settings: &'a Settings,
    state: Mutex<Reduction>,
    changed: Condvar,
}

struct Reduction {
    ring: Option<Ring>,
    arrived: usize,
    round: u64,
    largest: f64,
    broken: bool,
}

impl<'a> RankWide<'a> {
    fn new(settings: &'a Settings, ring: Option<Ring>) -> RankWide<'a> {
        let state = Reduction {
            ring,
            arrived: 0,
            round: 0,
            largest: 0.0,
            broken: false,
        };
        RankWide {
            settings,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Called by every thread of the rank; the last one to arrive speaks with the other ranks.
    fn reduce(&self, step: u64, change: f64) -> Outcome {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let round = state.round;
        state.largest = state.largest.max(change);
        state.arrived += 1;
        if state.arrived < self.settings.threads {
            while state.round == round && !state.broken {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            ensure!(!state.broken, "another thread gave up");
            return Ok(());
        }
        let mut largest = state.largest;
        if let Some(ring) = &mut state.ring {
            largest = ring.maximum(self.settings, step, largest)?;
        }
        state.arrived = 0;
        state.largest = 0.0;
        state.round += 1;
        self.changed.notify_all();
        drop(state);
        self.report(step, largest)
    }

    fn give_up(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .broken = true;
        self.changed.notify_all();
    }

    fn report(&self, step: u64, largest: f64) -> Outcome {
        let settings = self.settings;
        if let Some(path) = &settings.progress {
            replace(path, &format!("step {step}\n"))
                .explain(format!("cannot write {}", path.display()))?;
        }
        let often = (settings.steps / 10)
            .next_multiple_of(REDUCTION)
            .max(REDUCTION);
        if step.is_multiple_of(often) || step == settings.steps {
            say(&format!("step={step} change={largest:e}"));
        }
        Ok(())
    }
}

/// The ring of all ranks: a value goes around once to be maximised and once more to be known.
struct Ring {
    previous: TcpStream,
    next: TcpStream,
}

impl Ring {
    fn maximum(&mut self, settings: &Settings, step: u64, own: f64) -> Outcome<f64> {
        let mut value = own;
        for lap in 0..2 {
            if settings.rank == 0 {
                self.send(step, value)?;
                value = self.receive(step)?;
            } else {
                let incoming = self.receive(step)?;
                value = if lap == 0 {
                    value.max(incoming)
                } else {
                    incoming
                };
                self.send(step, value)?;
            }
        }
        Ok(value)
    }

    fn send(&mut self, step: u64, value: f64) -> Outcome {
        let mut message = step.to_le_bytes().to_vec();
        message.extend(value.to_le_bytes());
        self.next.write_all(&message).explain("ring, send")
    }

    fn receive(&mut self, step: u64) -> Outcome<f64> {
        let (theirs, value) = (
            read_word(&mut self.previous)?,
            read_word(&mut self.previous)?,
        );
        ensure!(
            theirs == step,
            "ring: rank before is at step {theirs}, this one at {step}"
        );
        Ok(f64::from_bits(value))
    }
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    Halo = 1,
    Ring = 2,
    Gather = 3,
}

/// The connections of a rank during the steps.
#[derive(Default)]
struct Links {
    halo_above: Option<TcpStream>,
    halo_below: Option<TcpStream>,
    ring: Option<Ring>,
}

impl Links {
    /// Every rank calls the next one (halo and ring; the last one closes the ring) and is called by the one before.
    fn connect(settings: &Settings, listener: &TcpListener) -> Outcome<Links> {
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
fn call(settings: &Settings, rank: usize, purpose: Purpose) -> Outcome<TcpStream> {
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
fn answer(listener: &TcpListener) -> Outcome<(TcpStream, Purpose, usize)> {
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

/// Brings the field to rank 0, which writes it and prints its hash: FNV-1a with 64 bits over the
/// little-endian bytes of all cells, row by row.
fn gather(settings: &Settings, listener: &TcpListener, blocks: &[Block]) -> Outcome {
    let own: Vec<u8> = blocks.iter().flat_map(Block::bytes).collect();
    if settings.rank > 0 {
        let mut stream = call(settings, 0, Purpose::Gather)?;
        stream
            .write_all(&own)
            .explain("sending the field to rank 0")?;
        // Rank 0 answers when it has everything: only then may this rank and its address go away.
        let last = read_word(&mut stream)?;
        ensure!(last == settings.steps, "rank 0 finished step {last}");
        return Ok(());
    }
    let mut parts: Vec<Option<Vec<u8>>> = vec![None; settings.ranks()];
    parts[0] = Some(own);
    let mut waiting = Vec::new();
    for _ in 1..settings.ranks() {
        let (mut stream, purpose, from) = answer(listener)?;
        ensure!(
            purpose == Purpose::Gather,
            "rank {from} called for {purpose:?} at the end"
        );
        let first = settings.first_row(from.saturating_mul(settings.threads));
        let end = settings.first_row(from.saturating_add(1).saturating_mul(settings.threads));
        let place = parts
            .get_mut(from)
            .explain(format!("part of rank {from}"))?;
        let mut part = vec![0; (end - first) * settings.size * 8];
        stream
            .read_exact(&mut part)
            .explain(format!("field of rank {from}"))?;
        ensure!(
            place.replace(part).is_none(),
            "rank {from} sent its field twice"
        );
        waiting.push(stream);
    }
    let parts: Vec<Vec<u8>> = parts.into_iter().flatten().collect();
    if let Some(path) = &settings.output {
        write_field(path, &parts).explain(format!("cannot write {}", path.display()))?;
    }
    let hash = parts.iter().fold(FNV_START, |hash, part| fnv1a(hash, part));
    for mut stream in waiting {
        stream
            .write_all(&settings.steps.to_le_bytes())
            .explain("farewell")?;
    }
    say(&format!("hash={hash:016x}"));
    Ok(())
}

fn write_field(path: &Path, parts: &[Vec<u8>]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for part in parts {
        file.write_all(part)?;
    }
    file.into_inner()
        .map_err(|error| error.into_error())?
        .sync_all()
}

/// Replaces a small file in one step, so that a reader sees the old or the new text.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

/// A line on standard output. A reader that went away must not end a computation of hours.
fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    if writeln!(output, "{line}")
        .and_then(|()| output.flush())
        .is_err()
    {
        eprintln!("crcoord-heat: standard output is closed; the line was: {line}");
    }
}

fn read_word(stream: &mut TcpStream) -> Outcome<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).explain("receive")?;
    Ok(u64::from_le_bytes(bytes))
}

fn to_bytes(numbers: &[f64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

fn to_numbers(bytes: &[u8]) -> Vec<f64> {
    let words = bytes.as_chunks::<8>().0;
    words.iter().map(|word| f64::from_le_bytes(*word)).collect()
}
