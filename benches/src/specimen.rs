//! The program that is captured: random memory, a thread that writes to every page again and again,
//! and a check that nothing of it was lost or torn.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crcoord_kernel::huge_pages;

use crate::failure::{Explain, Failure, Result};

/// Its first argument on the benches' command line.
pub const ROLE: &str = "specimen-role";
/// Said once all memory is there and is being written.
pub const READY: &str = "ready";
/// Asks for a check; end of input ends the program.
pub const CHECK: &str = "check";
/// The answer when all is well.
pub const GOOD: &str = "good";

const PAGE_WORDS: usize = 512;

/// `BYTES huge|small`
pub fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let bytes = arguments.next().and_then(|bytes| bytes.parse().ok());
    let huge = arguments.next().is_some_and(|pages| pages == "huge");
    match bytes
        .explain("no number of bytes")
        .and_then(|bytes| run(bytes, huge))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("specimen: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(bytes: usize, huge: bool) -> Result<()> {
    let mut memory = vec![0u64; bytes / 4096 * PAGE_WORDS];
    huge_pages::advise(&mut memory, huge).explain("madvise")?;
    for (at, word) in memory.iter_mut().enumerate() {
        *word = if at % PAGE_WORDS == 0 { 0 } else { noise(at) };
    }
    let asked = Arc::new(AtomicBool::new(false));
    std::thread::spawn({
        let asked = asked.clone();
        move || {
            let failure = write_for_ever(&mut memory, &asked);
            eprintln!("specimen: {failure}");
            std::process::exit(1);
        }
    });
    say(READY)?;
    for line in std::io::stdin().lock().lines() {
        if line.explain("standard input")? == CHECK {
            asked.store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Counts up the first word of every page, in order. A snapshot that is not of one instant would
/// show pages of the wrong count.
fn write_for_ever(memory: &mut [u64], asked: &AtomicBool) -> Failure {
    let mut sweep = 0u64;
    loop {
        for (number, page) in memory.chunks_exact_mut(PAGE_WORDS).enumerate() {
            if page[0] != sweep {
                return Failure(format!("page {number}: {} in sweep {sweep}", page[0]));
            }
            page[0] = sweep + 1;
        }
        sweep += 1;
        if asked.swap(false, Ordering::Relaxed) {
            if let Some(at) = first_wrong(memory) {
                return Failure(format!("word {at} has changed"));
            }
            if let Err(failure) = say(GOOD) {
                return failure;
            }
        }
    }
}

fn first_wrong(memory: &[u64]) -> Option<usize> {
    let words = memory.iter().enumerate();
    words
        .filter(|(at, _)| at % PAGE_WORDS != 0)
        .find(|(at, word)| **word != noise(*at))
        .map(|(at, _)| at)
}

/// What no compressor makes smaller: splitmix64 of the position.
fn noise(at: usize) -> u64 {
    let mut word = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn say(word: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{word}")
        .and_then(|()| output.flush())
        .explain("standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_page_is_found() {
        let asked = AtomicBool::new(false);
        let mut memory = vec![0u64; 4 * PAGE_WORDS];
        memory[2 * PAGE_WORDS] = 3;
        let failure = write_for_ever(&mut memory, &asked);
        assert_eq!(failure.0, "page 2: 3 in sweep 0");
    }

    #[test]
    fn changed_content_is_found() {
        let mut memory: Vec<u64> = (0..2 * PAGE_WORDS).map(noise).collect();
        memory[PAGE_WORDS] = 17; // a counter
        assert_eq!(first_wrong(&memory), None);
        memory[PAGE_WORDS + 1] ^= 1;
        assert_eq!(first_wrong(&memory), Some(PAGE_WORDS + 1));
    }
}
