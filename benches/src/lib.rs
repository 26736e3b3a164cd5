//! Side-by-side figures of crcoord. A rate means little on a machine that others use too, so every
//! figure is also a ratio to something measured in the same round: memcpy, a plain TCP copy, or
//! another revision. Rounds are interleaved; medians are told. Nothing here asserts a time.
#![forbid(unsafe_code)]

pub mod arguments;
pub mod bulk;
pub mod chunks;
pub mod command;
pub mod engine;
pub mod failure;
pub mod figures;
pub mod memory_copy;
pub mod pages_file;
pub mod restorer;
pub mod specimen;
pub mod tree;

use std::process::ExitCode;

/// Runs the hidden role that the command line names, if it names one: the benches start themselves
/// again as the program that is captured and as the process that restores.
pub fn hidden_role() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next()?.as_str() {
        specimen::ROLE => Some(specimen::main(arguments)),
        restorer::ROLE => Some(restorer::main(arguments)),
        _ => None,
    }
}
