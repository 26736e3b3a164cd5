//! The one binary `crcoord` as a library: roles, operator commands, and the demo with its cluster of
//! network namespaces, which tests use too.
#![forbid(unsafe_code)]

mod arguments;
pub mod client;
mod commands;
mod context;
pub mod demo;
pub mod failure;
mod logging;
mod output;
mod progress;
mod service;
mod users;

use std::process::ExitCode;

use clap::Parser;

use arguments::Arguments;
use crcoord_common::exit::ExitCode as Code;
use failure::Failure;

/// The whole program: reads the command line, does what it says, tells how it went.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refused_command_line(&error),
    };
    let json = arguments.global.json;
    // The status of `run` is the program's own: a failure of ours must not look like it.
    let returns_status = arguments.command.returns_programs_status();
    match arguments.command.execute(&arguments.global) {
        Ok(status) => status,
        Err(failure) => {
            failure.tell(json);
            match returns_status {
                true => Code::RunFailed.into(),
                false => failure.exit_code().into(),
            }
        }
    }
}

/// Help and version are no failures; of `run` a wrong command line must not look like the program's
/// status 2.
fn refused_command_line(error: &clap::Error) -> ExitCode {
    // Nothing is left to tell it to if the terminal is gone.
    let _ = error.print();
    match (error.exit_code(), named_command().as_deref()) {
        (0, _) => Code::Done.into(),
        (_, Some("run")) => Code::RunFailed.into(),
        _ => Code::Usage.into(),
    }
}

/// The first word of the command line that is neither an option nor its value.
fn named_command() -> Option<String> {
    let mut words = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned());
    loop {
        let word = words.next()?;
        match word.as_str() {
            "--config" | "--set" | "--log" => drop(words.next()),
            option if option.starts_with('-') => {}
            _ => return Some(word),
        }
    }
}

/// Runs a future of a command on this thread.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    run_on(tokio::runtime::Builder::new_current_thread(), future)
}

/// Runs a daemon's future on threads of all cores.
fn block_on_all<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    run_on(tokio::runtime::Builder::new_multi_thread(), future)
}

fn run_on<T>(
    mut runtime: tokio::runtime::Builder,
    future: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    runtime
        .enable_all()
        .build()
        .map_err(|error| Failure::internal("cannot start the event loop", &error))?
        .block_on(future)
}
