//! The table of programs: one line a noun.

use crcoord_zoo::Fate::{Later, Supported};
use crcoord_zoo::{Fate, Outcome, Program, Stage};

mod altstack;
mod char_devices;
mod cwd_umask_exe;
mod epoll;
mod eventfd;
mod fifo;
mod file_rollback;
mod files;
mod itimers;
mod memory_file;
mod memory_fork_cow;
mod memory_private;
mod memory_shared;
mod pipes;
mod registers;
mod rseq;
mod signalfd;
mod signals;
mod sleepers;
mod tcp_half_closed;
mod tcp_listen;
mod tcp_pair;
mod tcp_peer;
mod threads;
mod timerfd;
mod tree;
mod unix_socketpair;
mod vdso;

/// Every program, in the order of the listing.
#[rustfmt::skip]
pub const TABLE: &[Program] = &[
    row("memory_private", Supported, "private memory: content, holes, protections, fixed places, heap, huge pages", memory_private::run),
    row("memory_shared", Supported, "shared anonymous memory of three processes, with two views", memory_shared::run),
    row("memory_file", Supported, "private and shared file mappings, copied and partial pages", memory_file::run),
    row("memory_fork_cow", Supported, "pages shared copy-on-write by parent and child", memory_fork_cow::run),
    row("threads", Supported, "eight threads: ids, names, TLS, vector registers, locks, joins, robust mutex", threads::run),
    row("registers", Supported, "all general, flag, x87, SSE, AVX and AVX-512 registers of a spinning thread", registers::run),
    row("altstack", Supported, "alternate signal stacks, two of them in use by a handler", altstack::run),
    row("rseq", Supported, "restartable sequences: registration, and per-CPU counting without loss", rseq::run),
    row("signals", Supported, "dispositions, masks, and queued signals delivered once and in order", signals::run),
    row("sleepers", Supported, "threads blocked in eleven system calls that must not return early", sleepers::run),
    row("tree", Supported, "children, grandchildren, groups, sessions, statuses and zombies", tree::run),
    row("files", Supported, "regular files and a directory: offsets, flags, shared open files", files::run),
    row("file_rollback", Supported, "a file that grows until the cut holds exactly the lines written", file_rollback::run),
    row("char_devices", Supported, "null, zero, full, random, urandom", char_devices::run),
    row("pipes", Supported, "queued content, capacity, packets, blocked writer, half-closed and shared ends", pipes::run),
    row("tcp_listen", Supported, "listening sockets, one with a thread in accept", tcp_listen::run),
    row("tcp_pair", Supported, "established connections with data in all queues, options, a blocked writer", tcp_pair::run),
    row("tcp_half_closed", Supported, "connections shut down on one side, the FIN read, unread or unsent", tcp_half_closed::run),
    row("tcp_peer", Supported, "endless checked messages both ways; --listen or --connect for two sides", tcp_peer::run),
    row("eventfd", Supported, "event counters and semaphores, shared, one with a blocked reader", eventfd::run),
    row("epoll", Supported, "registrations, modes, data, nesting, pending and disabled events", epoll::run),
    row("itimers", Supported, "the three interval timers, armed far ahead", itimers::run),
    row("cwd_umask_exe", Supported, "directories, umask, names, vectors, limits, nice value, flags", cwd_umask_exe::run),
    row("vdso", Supported, "threads frozen inside clock_gettime and its kin", vdso::run),
    row("fifo", Later, "a named pipe with content", fifo::run),
    row("timerfd", Supported, "timer descriptors: far ahead, periodic, expired, disarmed", timerfd::run),
    row("signalfd", Supported, "a signal descriptor with pending signals", signalfd::run),
    row("unix_socketpair", Later, "stream and datagram pairs with queued data", unix_socketpair::run),
];

const fn row(
    name: &'static str,
    fate: Fate,
    purpose: &'static str,
    run: fn(&Stage) -> Outcome,
) -> Program {
    Program {
        name,
        fate,
        purpose,
        run,
    }
}
