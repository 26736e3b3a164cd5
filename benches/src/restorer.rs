//! The process that restores: one of its own for each restore, with one thread, as an agent starts
//! its engines.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crcoord_common::image::{Manifest, ManifestBody, SealingKey};
use crcoord_common::wire::engine::RestoreTarget;
use crcoord_engine::restore::Building;
use crcoord_kernel::sys::page_size;
use crcoord_store::{ImageDirectory, PartReader};

use crate::failure::{Explain, Failure, Result};
use crate::pages_file;
use crate::tree::{STREAMS, Tree};

/// Its first argument on the benches' command line.
pub const ROLE: &str = "restorer-role";
/// Name of the manifest beside a file of plain pages.
pub const PLAIN_MANIFEST: &str = "plain-manifest";
/// Name of the file of plain pages.
pub const PLAIN_PAGES: &str = "plain-pages";

/// Threads that read an image ahead: as `crcoord engine restore` has.
const READERS: usize = 2;

/// Where the pages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file of plain pages.
    Plain,
    /// An image: index walked, chunks read, decoded and verified.
    Image,
}

/// What a restore took.
#[derive(Clone, Copy, Debug)]
pub struct Restored {
    /// Bytes of pages filled in.
    pub bytes: u64,
    /// From the manifest's first byte until the tree runs.
    pub took: Duration,
}

/// Brings the tree with this pid back, by a process of its own.
pub fn restore(directory: &Path, source: Source, pid: i32) -> Result<(Tree, Restored)> {
    let own = std::env::current_exe().explain("own path")?;
    let word = match source {
        Source::Plain => "plain",
        Source::Image => "image",
    };
    let mut command = Command::new(own);
    command.args([ROLE, word]).arg(directory);
    let (tree, said) = Tree::restored_by(&mut command, pid, true)?;
    let numbers: Vec<u64> = said
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [root, bytes, microseconds] = numbers[..] else {
        return Err(Failure(format!("the restorer said {said:?}")));
    };
    if root != pid as u64 {
        return Err(Failure(format!("pid {pid} came back as {root}")));
    }
    let took = Duration::from_micros(microseconds);
    Ok((tree, Restored { bytes, took }))
}

/// `plain|image DIRECTORY`
pub fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let source = match arguments.next().as_deref() {
        Some("image") => Source::Image,
        _ => Source::Plain,
    };
    let directory = arguments.next().unwrap_or_default();
    match run(Path::new(&directory), source) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("restorer: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(directory: &Path, source: Source) -> Result<()> {
    let start = Instant::now();
    let building = match source {
        Source::Plain => plain(directory)?,
        Source::Image => image(directory)?,
    };
    let built = building.finish().explain("finishing")?;
    let (root, bytes) = (built.root(), built.filled());
    built.resume().explain("resuming")?;
    // The tree shares this stream, but says nothing before it is asked.
    println!("{root} {bytes} {}", start.elapsed().as_micros());
    Ok(())
}

fn plain(directory: &Path) -> Result<Building> {
    let path = directory.join(PLAIN_MANIFEST);
    let manifest = std::fs::read(&path).explain(path.display())?;
    let mut building = begin(decode(&manifest)?)?;
    pages_file::read_all(&directory.join(PLAIN_PAGES), |run, bytes| {
        building.fill(&run, bytes).explain("filling")
    })?;
    Ok(building)
}

fn image(directory: &Path) -> Result<Building> {
    let image = ImageDirectory::open(directory).explain("opening the image")?;
    let body = decode(image.manifest())?;
    let memory = body.memory.clone();
    let mut building = begin(body)?;
    PartReader::new(&memory, page_size(), &image)
        .read_all(READERS, |run, bytes| building.fill(&run, &bytes))
        .explain("filling")?;
    Ok(building)
}

fn decode(manifest: &[u8]) -> Result<ManifestBody> {
    Manifest::decode(manifest, &SealingKey::Checksum, page_size() as u32)
        .map(|manifest| manifest.body)
        .explain("the manifest")
}

fn begin(body: ManifestBody) -> Result<Building> {
    let streams = STREAMS.iter();
    let target = RestoreTarget {
        capsule: None,
        own_network: false,
        connections: Vec::new(),
        body,
        owner: None,
        substitutions: streams
            .map(|(fd, name)| ((*name).to_owned(), *fd))
            .collect(),
        addresses: Vec::new(),
        cgroup: None,
    };
    Building::begin(Box::new(target)).explain("building")
}
