//! Bulk streams beside plain TCP, and chunks (hash, compression) beside memcpy.

use std::process::ExitCode;

use clap::Parser;
use crcoord_benches::arguments::{Common, sizes};
use crcoord_benches::failure::Result;
use crcoord_benches::figures::{Collection, print};
use crcoord_benches::{bulk, chunks};
use crcoord_common::units::ByteSize;

/// Bulk transport beside a plain TCP copy, and hash and compression beside memcpy
#[derive(Debug, Parser)]
#[command(name = "bench-transport")]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Bytes to send and to encode; repeatable [default: 1G]
    #[arg(long = "size", value_name = "SIZE")]
    sizes: Vec<ByteSize>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bench-transport: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut collection = Collection::default();
    let common = &arguments.common;
    for bytes in sizes(&arguments.sizes, common.quick, &[1 << 30]) {
        bulk::measure(bytes, common.rounds(5), &mut collection)?;
        chunks::measure(bytes, common.rounds(3), &mut collection)?;
    }
    print("bench-transport", &collection.figures(), common.json)
}
