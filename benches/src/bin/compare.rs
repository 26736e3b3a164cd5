//! Two revisions of the `crcoord` binary side by side on the same process.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use crcoord_benches::arguments::{Common, Pages, sizes};
use crcoord_benches::command::{self, Revisions};
use crcoord_benches::failure::Result;
use crcoord_benches::figures::{Collection, print};
use crcoord_benches::hidden_role;
use crcoord_common::units::ByteSize;

/// `engine dump` and `engine restore` of two binaries in turn; ratios above 1: the candidate is faster
#[derive(Debug, Parser)]
#[command(name = "bench-compare")]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// The `crcoord` binary to compare with
    #[arg(long, value_name = "FILE")]
    baseline: PathBuf,
    /// The `crcoord` binary that is judged
    #[arg(long, value_name = "FILE", default_value = "target/release/crcoord")]
    candidate: PathBuf,
    /// Memory of the captured process; repeatable [default: 256M]
    #[arg(long = "size", value_name = "SIZE")]
    sizes: Vec<ByteSize>,
    /// Kind of its pages
    #[arg(long, default_value = "small")]
    pages: Pages,
    /// Where images go; memory, or the disk is measured
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    scratch: PathBuf,
}

fn main() -> ExitCode {
    if let Some(code) = hidden_role() {
        return code;
    }
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bench-compare: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut collection = Collection::default();
    let common = &arguments.common;
    let revisions = Revisions {
        baseline: arguments.baseline.clone(),
        candidate: arguments.candidate.clone(),
    };
    for bytes in sizes(&arguments.sizes, common.quick, &[256 << 20]) {
        let (pages, rounds) = (arguments.pages, common.rounds(6));
        command::compare(
            &revisions,
            bytes,
            pages,
            rounds,
            &arguments.scratch,
            &mut collection,
        )?;
    }
    print("bench-compare", &collection.figures(), common.json)
}
