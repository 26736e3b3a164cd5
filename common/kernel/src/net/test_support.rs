//! What the network tests share: fresh namespaces and connected pairs inside them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::namespace::{Namespace, NamespaceKind, loopback_up, unshare};

/// Runs a test on a thread of its own in a fresh network namespace whose loopback is up.
pub(super) fn in_fresh_network<T: Send>(
    name: &str,
    work: impl FnOnce(&Namespace) -> T + Send,
) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(&[NamespaceKind::Network]).unwrap_or_else(|error| {
                panic!("{name} needs CAP_SYS_ADMIN for a network namespace: {error}")
            });
            loopback_up().unwrap_or_else(|error| panic!("{name} needs CAP_NET_ADMIN: {error}"));
            work(&Namespace::current(NamespaceKind::Network).unwrap())
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs an ignored test of this binary in a process of its own, as root of fresh user and network
/// namespaces: with CAP_NET_ADMIN there and none over the machine.
pub(super) fn run_in_user_namespace(name: &str, helper: &str) {
    let run = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", helper, "--ignored"])
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{name} needs unshare(1): {error}"));
    let output = String::from_utf8_lossy(&run.stdout);
    let errors = String::from_utf8_lossy(&run.stderr);
    let passed = run.status.success() && output.contains("1 passed");
    assert!(passed, "{name} (needs user namespaces): {output} {errors}");
}

/// A connected pair over loopback in the calling thread's namespace.
pub(super) fn pair(address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    for stream in [&one, &other] {
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(30)))
            .unwrap();
    }
    (one, other)
}

/// True if a message sent into `from` comes out of `to` within the time.
pub(super) fn passes(from: &mut TcpStream, to: &mut TcpStream, within: Duration) -> bool {
    from.write_all(b"!").unwrap();
    arrives(to, within)
}

/// True if at least one byte can be read from `to` within the time.
pub(super) fn arrives(to: &mut TcpStream, within: Duration) -> bool {
    let before = to.read_timeout().unwrap();
    to.set_read_timeout(Some(within)).unwrap();
    let outcome = to.read(&mut [0]);
    to.set_read_timeout(before).unwrap();
    matches!(outcome, Ok(1))
}

/// A pattern without short repetitions.
pub(super) fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect()
}
