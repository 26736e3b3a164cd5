//! A plain file of pages, neither hashed nor compressed: what the engine does when nothing else has
//! to be done.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::Path;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{PageRun, WINDOW_BYTES};
use crcoord_common::report::{Class, Report};
use crcoord_engine::PageSink;
use crcoord_kernel::sys::page_size;

use crate::failure::{Explain, Failure, Result};

const HEADER: usize = 14;

/// Writes runs one after the other: object, window, present pages, bytes.
#[derive(Debug)]
pub struct PagesWriter(BufWriter<File>);

impl PagesWriter {
    /// A new file.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).explain(path.display())?;
        Ok(PagesWriter(BufWriter::with_capacity(1 << 20, file)))
    }

    /// Hands the rest to the kernel.
    pub fn finish(mut self) -> Result<()> {
        self.0.flush().explain("writing pages")
    }
}

impl PageSink for PagesWriter {
    fn put(&mut self, run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&run.object.0.to_le_bytes());
        header[4..12].copy_from_slice(&run.window.to_le_bytes());
        header[12..].copy_from_slice(&run.present.to_le_bytes());
        let written = self
            .0
            .write_all(&header)
            .and_then(|()| self.0.write_all(bytes));
        written.map_err(|error| Report::new("bench-pages", Class::Failure, error.to_string()))
    }
}

/// Gives every run of the file to `visit`.
pub fn read_all(path: &Path, mut visit: impl FnMut(PageRun, &[u8]) -> Result<()>) -> Result<()> {
    let file = File::open(path).explain(path.display())?;
    let mut input = BufReader::with_capacity(1 << 20, file);
    let mut bytes = vec![0; WINDOW_BYTES as usize];
    let mut header = [0; HEADER];
    loop {
        match input.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(Failure(format!("{}: {error}", path.display()))),
        }
        let run = PageRun {
            object: ObjectId(u32::from_le_bytes(part(&header, 0))),
            window: u64::from_le_bytes(part(&header, 4)),
            present: u16::from_le_bytes(part(&header, 12)),
        };
        let bytes = &mut bytes[..run.bytes(page_size()) as usize];
        input.read_exact(bytes).explain(path.display())?;
        visit(run, bytes)?;
    }
}

fn part<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    std::array::from_fn(|index| header[at + index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages");
        let runs: Vec<PageRun> = (1..4)
            .map(|number| PageRun {
                object: ObjectId(number),
                window: 1 << number,
                present: 0b101,
            })
            .collect();
        let mut writer = PagesWriter::create(&path).unwrap();
        for run in &runs {
            let length = run.bytes(page_size()) as usize;
            writer.put(*run, &vec![run.window as u8; length]).unwrap();
        }
        writer.finish().unwrap();
        let mut found = Vec::new();
        read_all(&path, |run, bytes| {
            assert!(bytes.iter().all(|byte| *byte == run.window as u8));
            found.push(run);
            Ok(())
        })
        .unwrap();
        assert_eq!(found, runs);
    }
}
