//! The demo's job as a program of its own.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    crcoord_zoo::heat::main(&arguments)
}
