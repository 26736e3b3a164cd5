//! Page bytes on their way out of and into processes.

use crcoord_common::image::{PageRun, WINDOW_BYTES};
use crcoord_common::report::Report;
use crcoord_kernel::memory::{self, Piece};
use crcoord_kernel::sys::page_size;

use crate::error::{Result, failure};

/// Takes pages that were read from processes.
pub trait PageSink {
    /// Takes the bytes of one run; they are not needed afterwards.
    fn put(&mut self, run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report>;
}

/// Gives pages to be filled into processes.
pub trait PageSource {
    /// Calls `fill` once for every run of the image, in any order.
    fn each(
        &mut self,
        fill: &mut dyn FnMut(PageRun, &[u8]) -> std::result::Result<(), Report>,
    ) -> std::result::Result<(), Report>;
}

/// A range of pages to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// First address or offset.
    pub start: u64,
    /// Address or offset after the last.
    pub end: u64,
    /// Pages of zeros are content (they replace a file's) and are kept.
    pub keep_zeros: bool,
}

/// Cuts ascending ranges at window borders and reads each window by `read`, which fills the buffer
/// from the given pieces; drops pages of zeros; hands the rest to `sink`. Gives the bytes handed on.
pub fn stream(
    object: crcoord_common::ids::ObjectId,
    ranges: &[PageRange],
    read: &mut dyn FnMut(&[Piece], &mut [u8]) -> std::io::Result<()>,
    sink: &mut dyn PageSink,
) -> Result<u64> {
    let page = page_size();
    let mut buffer = vec![0u8; WINDOW_BYTES as usize];
    let mut handed = 0;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut keep = 0u16;
    let mut window = 0;
    let mut flush = |window: u64, pieces: &mut Vec<Piece>, keep: u16| -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let length: usize = pieces.iter().map(|piece| piece.1).sum();
        read(pieces, &mut buffer[..length])
            .map_err(|error| failure("reading memory", &error).address(address(pieces)))?;
        let mut present = 0u16;
        let mut kept = 0usize;
        let mut position = 0usize;
        for (start, length) in pieces.drain(..) {
            for at in (start..start + length as u64).step_by(page as usize) {
                let bit = 1u16 << ((at % WINDOW_BYTES) / page);
                let here = position..position + page as usize;
                position = here.end;
                if keep & bit == 0 && is_zero(&buffer[here.clone()]) {
                    continue;
                }
                present |= bit;
                if here.start != kept {
                    buffer.copy_within(here, kept);
                }
                kept += page as usize;
            }
        }
        if present != 0 {
            sink.put(
                PageRun {
                    object,
                    window,
                    present,
                },
                &buffer[..kept],
            )?;
            handed += kept as u64;
        }
        Ok(())
    };
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            if at / WINDOW_BYTES != window {
                flush(window, &mut pieces, keep)?;
                (window, keep) = (at / WINDOW_BYTES, 0);
            }
            let end = range.end.min((window + 1) * WINDOW_BYTES);
            match pieces.last_mut() {
                Some((start, length)) if *start + *length as u64 == at => {
                    *length += (end - at) as usize;
                }
                _ => pieces.push((at, (end - at) as usize)),
            }
            if range.keep_zeros {
                for page_at in (at..end).step_by(page as usize) {
                    keep |= 1 << ((page_at % WINDOW_BYTES) / page);
                }
            }
            at = end;
        }
    }
    flush(window, &mut pieces, keep)?;
    Ok(handed)
}

fn address(pieces: &[Piece]) -> String {
    pieces
        .first()
        .map_or_else(String::new, |piece| format!("{:#x}", piece.0))
}

fn is_zero(bytes: &[u8]) -> bool {
    let (before, words, after) = (&bytes[..0], bytes.chunks_exact(64), bytes.len() % 64);
    let tail = &bytes[bytes.len() - after..];
    before.iter().chain(tail).all(|byte| *byte == 0)
        && words
            .into_iter()
            .all(|word| word.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Writes one run into a process's private memory.
pub fn fill(pid: i32, run: &PageRun, bytes: &[u8]) -> Result<()> {
    let pieces: Vec<Piece> = run
        .pieces(page_size())
        .map(|(address, _, length)| (address, length))
        .collect();
    memory::write_pieces(pid, &pieces, bytes).map_err(|error| {
        failure("filling memory", &error)
            .pid(pid)
            .address(format!("{:#x}", run.start()))
            .into()
    })
}

#[cfg(test)]
mod tests {
    use crcoord_common::ids::ObjectId;

    use super::*;

    #[derive(Default)]
    struct Collected(Vec<(PageRun, Vec<u8>)>);

    impl PageSink for Collected {
        fn put(&mut self, run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
            self.0.push((run, bytes.to_vec()));
            Ok(())
        }
    }

    /// Memory in which page n is filled with byte n, and every third page with zeros.
    fn pattern(pieces: &[Piece], buffer: &mut [u8]) -> std::io::Result<()> {
        let mut position = 0;
        for (start, length) in pieces {
            for at in (*start..start + *length as u64).step_by(4096) {
                let page = at / 4096;
                let value = if page % 3 == 0 { 0 } else { page as u8 };
                buffer[position..position + 4096].fill(value);
                position += 4096;
            }
        }
        Ok(())
    }

    #[test]
    fn windows_are_cut_and_zeros_dropped() {
        let page = 4096;
        let ranges = [
            PageRange {
                start: 14 * page,
                end: 18 * page,
                keep_zeros: false,
            },
            PageRange {
                start: 21 * page,
                end: 22 * page,
                keep_zeros: true,
            },
            PageRange {
                start: 24 * page,
                end: 25 * page,
                keep_zeros: false,
            },
        ];
        let mut sink = Collected::default();
        let bytes = stream(ObjectId(1), &ranges, &mut pattern, &mut sink).unwrap();
        assert_eq!(bytes, 4 * page);
        let [(first, first_bytes), (second, second_bytes)] = &sink.0[..] else {
            panic!()
        };
        assert_eq!((first.window, first.present), (0, 1 << 14));
        assert!(first_bytes.iter().all(|byte| *byte == 14));
        assert_eq!((second.window, second.present), (1, 0b10_0011));
        assert_eq!(second_bytes.len(), 3 * 4096);
        assert_eq!(
            (second_bytes[0], second_bytes[4096], second_bytes[8192]),
            (16, 17, 0)
        );
    }
}
