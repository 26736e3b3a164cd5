//! The end of a run: the field comes to rank 0, which writes it and prints its hash.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::net::TcpListener;
use std::path::Path;

use super::block::Block;
use super::links::{Purpose, answer, call, read_word};
use super::rank::say;
use super::settings::Settings;
use crate::pattern::{FNV_START, fnv1a};
use crate::{Explain, Outcome, ensure};

/// Brings the field to rank 0, which writes it and prints its hash: FNV-1a with 64 bits over the
/// little-endian bytes of all cells, row by row.
pub(super) fn gather(settings: &Settings, listener: &TcpListener, blocks: &[Block]) -> Outcome {
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

pub(super) fn write_field(path: &Path, parts: &[Vec<u8>]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for part in parts {
        file.write_all(part)?;
    }
    file.into_inner()
        .map_err(|error| error.into_error())?
        .sync_all()
}
