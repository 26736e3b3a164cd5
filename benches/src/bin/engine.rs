//! Freeze, capture and restore of one process that keeps writing to all of its memory, beside memcpy.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use crcoord_benches::arguments::{Common, Pages, sizes};
use crcoord_benches::failure::Result;
use crcoord_benches::figures::{Collection, print};
use crcoord_benches::{engine, hidden_role};
use crcoord_common::units::ByteSize;

/// Freeze time, capture rate and restore rate, each in the same round as memcpy of as many bytes
#[derive(Debug, Parser)]
#[command(name = "bench-engine")]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Memory of the captured process; repeatable [default: 256M and 1G]
    #[arg(long = "size", value_name = "SIZE")]
    sizes: Vec<ByteSize>,
    /// Kind of its pages; repeatable [default: both]
    #[arg(long)]
    pages: Vec<Pages>,
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
            eprintln!("bench-engine: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut collection = Collection::default();
    let kinds = match arguments.pages[..] {
        [] => &[Pages::Small, Pages::Huge],
        ref asked => asked,
    };
    let common = &arguments.common;
    for bytes in sizes(&arguments.sizes, common.quick, &[256 << 20, 1 << 30]) {
        for &pages in kinds {
            let rounds = common.rounds(3);
            engine::measure(bytes, pages, rounds, &arguments.scratch, &mut collection)?;
        }
    }
    print("bench-engine", &collection.figures(), common.json)
}
