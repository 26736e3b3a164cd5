//! `crcoord engine`: capture and restore of one process tree alone, without daemons.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use crcoord_common::exit::ExitCode;
use crcoord_common::image::{Architecture, Manifest, ManifestBody, PageRun, SealingKey};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::CaptureOptions;
use crcoord_common::wire::engine::{CaptureTarget, LeftOut, RestoreTarget, Scope};
use crcoord_engine::capture::{self, Held};
use crcoord_engine::resources::mappings::ContentHashes;
use crcoord_engine::restore::Building;
use crcoord_engine::{EngineError, PageSink};
use crcoord_kernel::sys::page_size;
use crcoord_store::{ImageDirectory, ImageWriter, PartReader, PartWriter, ReadError, StoreError};

use crate::failure::{Failure, Outcome};
use crate::output;

/// Arguments of `engine`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the image of a running process tree; the tree is gone afterwards
    Dump(Dump),
    /// Bring a process tree back from its image, detached, with the same pids
    Restore(Restore),
    /// Serve an agent over descriptor 3 (started by agents only)
    #[command(hide = true)]
    Serve,
}

#[derive(Debug, Args)]
struct Dump {
    /// Root process of the tree
    #[arg(long)]
    pid: i32,
    /// Directory for the image: manifest and pack
    #[arg(long)]
    dir: PathBuf,
    /// Let the tree run on
    #[arg(long)]
    leave_running: bool,
    /// Leave the standard streams out; at restore the restorer's take their place
    #[arg(long)]
    leave_stdio: bool,
    /// What becomes of connections to processes outside the tree
    #[arg(long, value_enum, default_value_t = ExternalTcp::Refuse)]
    external_tcp: ExternalTcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ExternalTcp {
    /// They are an obstacle
    Refuse,
    /// The tree finds them reset at restore
    Reset,
}

#[derive(Debug, Args)]
struct Restore {
    /// Directory with the image
    #[arg(long)]
    dir: PathBuf,
}

impl Arguments {
    /// Does it.
    pub fn execute(self) -> Outcome {
        match self.command {
            Command::Dump(dump) => dump.execute(),
            Command::Restore(restore) => restore.execute(),
            Command::Serve => match crcoord_engine::serve::main() {
                Ok(()) => Ok(ExitCode::Done.into()),
                Err(error) => Err(Failure::internal("engine", &error)),
            },
        }
    }
}

fn from_engine(error: EngineError) -> Failure {
    Failure::new(error.0)
}

fn from_store(error: &StoreError) -> Failure {
    error.report().into()
}

/// Puts pages into the part being written.
struct Pages(PartWriter);

impl PageSink for Pages {
    fn put(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), Report> {
        self.0.put(run, bytes).map_err(|error| error.report())
    }
}

impl Dump {
    fn execute(self) -> Outcome {
        let target = CaptureTarget {
            scope: Scope::Tree(self.pid),
            own_network: false,
            left_out: self.left_out(),
            options: CaptureOptions {
                reset_external_tcp: self.external_tcp == ExternalTcp::Reset,
                ..CaptureOptions::default()
            },
        };
        let mut hashes = ContentHashes::default();
        let preflight = capture::preflight(&target, &mut hashes).map_err(from_engine)?;
        let (notes, obstacles): (Vec<Report>, Vec<Report>) = preflight
            .findings
            .into_iter()
            .partition(|report| report.class == Class::Note);
        for note in notes {
            output::message(&note.to_string());
        }
        if !obstacles.is_empty() {
            return Err(Failure::new(obstacles));
        }
        let image = Arc::new(ImageDirectory::create(&self.dir).map_err(|e| from_store(&e))?);
        let held = Held::hold(target, hashes).map_err(from_engine)?;
        let captured = held.capture(!self.leave_running).map_err(from_engine)?;
        let summary = captured.summary().clone();
        let (mut streaming, frozen) = captured.release();
        let mut pages = Pages(PartWriter::new(page_size(), vec![image.clone()]));
        let mut body = streaming.stream(&mut pages).map_err(from_engine)?;
        body.memory = pages.0.finish().map_err(|error| from_store(&error))?;
        drop(pages);
        seal(&image, body)?;
        streaming.end().map_err(from_engine)?;
        output::message(&format!(
            "pid {}: {} processes, {} threads, {} bytes of memory, frozen {:.1} ms",
            self.pid,
            summary.processes,
            summary.threads,
            summary.memory_bytes,
            frozen.as_secs_f64() * 1e3,
        ));
        Ok(ExitCode::Done.into())
    }
}

fn seal(image: &ImageWriter, body: ManifestBody) -> Result<(), Failure> {
    let manifest = Manifest {
        architecture: Architecture::NATIVE,
        page_size: page_size() as u32,
        body,
    };
    image
        .seal(&manifest.encode(&SealingKey::Checksum))
        .map(drop)
        .map_err(|error| from_store(&error))
}

impl Dump {
    /// The standard streams of the root process, where they are not files of its own.
    fn left_out(&self) -> Vec<LeftOut> {
        use std::os::unix::fs::MetadataExt;
        if !self.leave_stdio {
            return Vec::new();
        }
        STREAMS
            .iter()
            .filter_map(|(fd, name)| {
                // A closed stream needs no stand-in.
                let metadata = std::fs::metadata(format!("/proc/{}/fd/{fd}", self.pid)).ok()?;
                Some(LeftOut {
                    device: metadata.dev(),
                    inode: metadata.ino(),
                    name: (*name).to_owned(),
                })
            })
            .collect()
    }
}

/// Descriptors and names of the standard streams.
const STREAMS: [(i32, &str); 3] = [(0, "stdin"), (1, "stdout"), (2, "stderr")];

impl Restore {
    fn execute(self) -> Outcome {
        let image = ImageDirectory::open(&self.dir).map_err(|e| from_image(&e, &self.dir))?;
        let manifest =
            Manifest::decode(image.manifest(), &SealingKey::Checksum, page_size() as u32)
                .map_err(|error| refused(&error, &self.dir))?;
        let memory = manifest.body.memory.clone();
        let reader = PartReader::new(&memory, page_size(), &image);
        let damage = reader.verify(1);
        if let Some(first) = damage.damage.first() {
            return Err(from_image(&first.error, &self.dir));
        }
        let target = RestoreTarget {
            capsule: None,
            own_network: false,
            connections: crcoord_engine::resources::tcp::ends(&manifest.body.records),
            body: manifest.body,
            owner: None,
            substitutions: STREAMS
                .iter()
                .map(|(fd, name)| ((*name).to_owned(), *fd))
                .collect(),
            addresses: Vec::new(),
            cgroup: None,
        };
        let mut building = Building::begin(Box::new(target)).map_err(from_engine)?;
        reader
            .read_all(2, |run, bytes| building.fill(&run, &bytes))
            .map_err(|error| match error {
                ReadError::Consumer(error) => from_engine(error),
                ReadError::Image { error, .. } => from_store(&error),
            })?;
        let built = building.finish().map_err(from_engine)?;
        let root = built.root();
        built.resume().map_err(from_engine)?;
        output::message(&format!("pid {root} runs"));
        Ok(ExitCode::Done.into())
    }
}

/// An image that cannot be used is an obstacle: nothing was built.
fn from_image(error: &StoreError, directory: &Path) -> Failure {
    match error {
        StoreError::NoImage { .. }
        | StoreError::Damaged { .. }
        | StoreError::Foreign { .. }
        | StoreError::TooNew { .. }
        | StoreError::Missing { .. }
        | StoreError::BadChunk { .. }
        | StoreError::BadRun { .. } => refused(error, directory),
        _ => from_store(error),
    }
}

fn refused(error: &dyn std::error::Error, directory: &Path) -> Failure {
    Report::new("image-refused", Class::Obstacle, error.to_string())
        .path(directory.display().to_string())
        .remedy("take another image")
        .into()
}
