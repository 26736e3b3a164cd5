//! Captures of a specimen that keeps writing, by the library calls that an engine process makes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crcoord_common::image::{Architecture, Manifest, ManifestBody, PageRun, SealingKey};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::CaptureOptions;
use crcoord_common::wire::engine::{CaptureTarget, Scope};
use crcoord_engine::PageSink;
use crcoord_engine::capture::{self, Held, Streaming};
use crcoord_engine::resources::mappings::ContentHashes;
use crcoord_kernel::sys::page_size;
use crcoord_store::{ImageDirectory, PartWriter};

use crate::arguments::Pages;
use crate::failure::{Explain, Failure, Result};
use crate::figures::{Collection, Sample, size_label};
use crate::memory_copy::MemoryCopy;
use crate::pages_file::PagesWriter;
use crate::restorer::{self, PLAIN_MANIFEST, PLAIN_PAGES, Source};
use crate::tree::Tree;

/// What the ratios are to.
const YARDSTICK: &str = "memcpy";

/// Measures one size and kind of pages in so many rounds; `scratch` is a directory in memory.
pub fn measure(
    bytes: u64,
    pages: Pages,
    rounds: u32,
    scratch: &Path,
    collection: &mut Collection,
) -> Result<()> {
    let subject = format!("{} {}", size_label(bytes), pages.label());
    let mut copy = MemoryCopy::new();
    copy.run(bytes);
    let home = tempfile::tempdir_in(scratch).explain(scratch.display())?;
    let mut tree = Tree::start(bytes, pages, home.path())?;
    if pages == Pages::Huge {
        let share = tree.huge_share()?;
        if share < 0.9 {
            return Err(Failure(format!(
                "{subject}: only {:.0} % of the memory is on huge pages: allow them by \"echo \
                 madvise > /sys/kernel/mm/transparent_hugepage/enabled\" or free some memory",
                share * 100.0
            )));
        }
    }
    for _ in 0..rounds {
        let directory = tempfile::tempdir_in(scratch).explain(scratch.display())?;
        let yardstick = copy.run(bytes);
        for kind in SINKS {
            let taken = take(&tree, kind, &mut copy.destination, directory.path())?;
            let sample = Sample {
                took: taken.took,
                yardstick,
                frozen: Some(taken.frozen),
            };
            collection.add(&subject, kind.label(), taken.bytes, YARDSTICK, sample);
        }
        let yardstick = copy.run(bytes);
        let image = image_of(directory.path());
        for (label, source, from) in [
            ("restore, plain pages", Source::Plain, directory.path()),
            ("restore, image", Source::Image, image.as_path()),
        ] {
            let pid = tree.pid();
            tree.end()?;
            let (restored_tree, restored) = restorer::restore(from, source, pid)?;
            tree = restored_tree;
            tree.check()?;
            let sample = Sample {
                took: restored.took,
                yardstick,
                frozen: None,
            };
            collection.add(&subject, label, restored.bytes, YARDSTICK, sample);
        }
    }
    tree.end()
}

/// Where the pages of a capture go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sink {
    Counted,
    Copied,
    Plain,
    Image,
}

const SINKS: [Sink; 4] = [Sink::Counted, Sink::Copied, Sink::Plain, Sink::Image];

impl Sink {
    fn label(self) -> &'static str {
        match self {
            Sink::Counted => "capture, counted",
            Sink::Copied => "capture, copied",
            Sink::Plain => "capture, plain pages",
            Sink::Image => "capture, image",
        }
    }
}

/// A capture that was taken.
struct Taken {
    bytes: u64,
    /// From before the hold until the last page was handed on, or the image was whole.
    took: Duration,
    frozen: Duration,
}

/// Captures the tree, which runs on.
fn take(tree: &Tree, kind: Sink, room: &mut [u8], directory: &Path) -> Result<Taken> {
    let target = CaptureTarget {
        scope: Scope::Tree(tree.pid()),
        own_network: false,
        left_out: tree.left_out()?,
        options: CaptureOptions::default(),
    };
    let mut hashes = ContentHashes::default();
    let preflight = capture::preflight(&target, &mut hashes).explain("preflight")?;
    let obstacle = preflight
        .findings
        .iter()
        .find(|report| report.class != Class::Note);
    if let Some(obstacle) = obstacle {
        return Err(Failure(format!("preflight: {obstacle}")));
    }
    let start = Instant::now();
    let held = Held::hold(target, hashes).explain("hold")?;
    let captured = held.capture(false).explain("capture")?;
    let (mut streaming, frozen) = captured.release();
    let bytes = match kind {
        Sink::Counted => {
            let mut sink = Counted(0);
            streaming.stream(&mut sink).explain("streaming")?;
            sink.0
        }
        Sink::Copied => {
            let mut sink = Copied {
                room,
                at: 0,
                bytes: 0,
            };
            streaming.stream(&mut sink).explain("streaming")?;
            sink.bytes
        }
        Sink::Plain => plain(&mut streaming, directory)?,
        Sink::Image => image(&mut streaming, &image_of(directory))?,
    };
    let took = start.elapsed();
    streaming.end().explain("ending the capture")?;
    Ok(Taken {
        bytes,
        took,
        frozen,
    })
}

fn image_of(directory: &Path) -> PathBuf {
    directory.join("image")
}

/// Looks at no byte.
struct Counted(u64);

impl PageSink for Counted {
    fn put(&mut self, _run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
        self.0 += bytes.len() as u64;
        Ok(())
    }
}

/// Copies into memory, from the start again when the room is full.
struct Copied<'a> {
    room: &'a mut [u8],
    at: usize,
    bytes: u64,
}

impl PageSink for Copied<'_> {
    fn put(&mut self, _run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
        if self.at + bytes.len() > self.room.len() {
            self.at = 0;
        }
        self.room[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

fn plain(streaming: &mut Streaming, directory: &Path) -> Result<u64> {
    let mut sink = PagesWriter::create(&directory.join(PLAIN_PAGES))?;
    let body = streaming.stream(&mut sink).explain("streaming")?;
    sink.finish()?;
    let bytes = body.memory.iter().map(|entry| entry.bytes).sum();
    let path = directory.join(PLAIN_MANIFEST);
    std::fs::write(&path, encode(body)).explain(path.display())?;
    Ok(bytes)
}

/// As `crcoord engine dump` does it: one thread reads, hashes, compresses and writes.
fn image(streaming: &mut Streaming, directory: &Path) -> Result<u64> {
    struct Pages(PartWriter);
    impl PageSink for Pages {
        fn put(&mut self, run: PageRun, bytes: &[u8]) -> std::result::Result<(), Report> {
            self.0.put(run, bytes).map_err(|error| error.report())
        }
    }
    let writer = Arc::new(ImageDirectory::create(directory).explain(directory.display())?);
    let mut pages = Pages(PartWriter::new(page_size(), vec![writer.clone()]));
    let mut body = streaming.stream(&mut pages).explain("streaming")?;
    body.memory = pages.0.finish().explain("the page index")?;
    let bytes = pages.0.progress().given_bytes;
    writer.seal(&encode(body)).explain("sealing the image")?;
    Ok(bytes)
}

fn encode(body: ManifestBody) -> Vec<u8> {
    let manifest = Manifest {
        architecture: Architecture::NATIVE,
        page_size: page_size() as u32,
        body,
    };
    manifest.encode(&SealingKey::Checksum)
}
