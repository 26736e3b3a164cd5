//! The multi-call binary `zoo`: finds the program in the table and reports how it went.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use crcoord_zoo::{Failure, Stage};

mod programs;

/// The exit status for a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else {
        return usage("no program named");
    };
    if name == "list" {
        return list();
    }
    let Some(program) = programs::TABLE.iter().find(|program| program.name == name) else {
        return usage(&format!("no program {name}"));
    };
    let stage = match Stage::parse(program.name, rest) {
        Ok(stage) => stage,
        Err(failure) => return usage(&failure.to_string()),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| (program.run)(&stage)))
        .unwrap_or_else(|_| Err(Failure::new("panicked (see stderr)")));
    if let Err(failure) = &outcome {
        eprintln!("zoo {name}: {failure}");
    }
    stage.finish(&outcome)
}

fn list() -> ExitCode {
    let mut output = std::io::stdout().lock();
    for program in programs::TABLE {
        let line = writeln!(
            output,
            "{}\t{}\t{}",
            program.name, program.fate, program.purpose
        );
        if line.is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn usage(problem: &str) -> ExitCode {
    eprintln!(
        "zoo: {problem}\nusage: zoo list\n       \
         zoo NAME --ready FILE --go FILE --result FILE [--dir DIR] [flags of NAME]"
    );
    ExitCode::from(USAGE)
}
