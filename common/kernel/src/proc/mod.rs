//! What /proc tells of a process, parsed strictly (proc(5)).

mod fdinfo;
mod maps;
mod task;

pub use fdinfo::{EpollTarget, FdInfo, fdinfo, timerfd};
pub use maps::{Mapping, mappings, vm_flags};
pub use task::{Credentials, Stat, Status, children, descriptors, limits, threads};

use std::io;

/// A line that is not what this kernel version is known to print.
pub(crate) fn malformed(what: &str, line: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what}: unexpected {line:?}"),
    )
}
