//! Every system call wrapper, ptrace type and kernel probe of crcoord: the only crate with `unsafe`.
//!
//! Nothing here knows jobs, images or policies. Each wrapper is safe to call with any argument; what
//! the kernel refuses comes back as `io::Error`.

pub mod arch;
pub mod credentials;
pub mod fault;
pub mod huge_pages;
pub mod inject;
pub mod memory;
pub mod namespace;
pub mod net;
pub mod number;
pub mod objects;
pub mod pagemap;
pub mod proc;
pub mod process_control;
pub mod ptrace;
pub mod ring;
pub mod socket_options;
pub mod stub;
pub mod sys;
