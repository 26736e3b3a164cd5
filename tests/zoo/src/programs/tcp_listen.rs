//! Listening TCP sockets: addresses, backlog and options stay, and connections are accepted afterwards.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use crcoord_zoo::descriptors::{checked, owned};
use crcoord_zoo::tasks::{await_blocked, eventually, gettid};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, descriptors, ensure_equal, sockets};

pub fn run(stage: &Stage) -> Outcome {
    let mut listeners = vec![
        Listener::set_up(IpAddr::V4(Ipv4Addr::LOCALHOST), 5, true)?,
        Listener::set_up(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 64, false)?,
    ];
    if has_ipv6() {
        listeners.push(Listener::set_up(IpAddr::V6(Ipv6Addr::LOCALHOST), 7, true)?);
        listeners.push(Listener::set_up(
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            9,
            true,
        )?);
    }
    let blocked = Blocked::set_up()?;
    stage.ready()?;
    stage.wait_for_go();
    for listener in &listeners {
        listener
            .verify()
            .explain(format!("listener on {}", listener.address))?;
    }
    blocked.verify()
}

/// A machine may be without IPv6; it then has no such listeners to lose.
fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    backlog: u32,
    nonblocking: bool,
}

impl Listener {
    fn set_up(address: IpAddr, backlog: u32, nonblocking: bool) -> Outcome<Listener> {
        let family = if address.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let listener = TcpListener::bind((address, 0)).explain(format!("bind {address}"))?;
        // The standard library chooses the backlog; a second listen changes it.
        // SAFETY: listen has no memory arguments.
        checked(unsafe { libc::listen(listener.as_raw_fd(), backlog as i32) }).explain("listen")?;
        listener
            .set_nonblocking(nonblocking)
            .explain("O_NONBLOCK")?;
        if family == libc::AF_INET6 {
            // Only possible before bind; the default is what must be kept.
            sockets::option(&listener, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).explain("V6ONLY")?;
        }
        let address = listener.local_addr().explain("getsockname")?;
        Ok(Listener {
            listener,
            address,
            backlog,
            nonblocking,
        })
    }

    fn verify(&self) -> Outcome {
        let listener = &self.listener;
        ensure_equal!(
            listener.local_addr().explain("getsockname")?,
            self.address,
            "address"
        );
        let reuse = sockets::option(listener, libc::SOL_SOCKET, libc::SO_REUSEADDR);
        ensure_equal!(reuse.explain("SO_REUSEADDR")?, 1, "SO_REUSEADDR");
        let listening = sockets::option(listener, libc::SOL_SOCKET, libc::SO_ACCEPTCONN);
        ensure_equal!(listening.explain("SO_ACCEPTCONN")?, 1, "SO_ACCEPTCONN");
        // For a listening socket the kernel shows the backlog here (tcp_get_info, net/ipv4/tcp.c).
        let information = sockets::tcp_information(listener).explain("TCP_INFO")?;
        ensure_equal!(information.tcpi_sacked, self.backlog, "backlog");
        let flags = descriptors::status_flags(listener).explain("F_GETFL")?;
        ensure_equal!(
            flags & libc::O_NONBLOCK != 0,
            self.nonblocking,
            "O_NONBLOCK"
        );
        if self.nonblocking {
            let early = listener.accept().err().map(|error| error.kind());
            ensure_equal!(
                early,
                Some(std::io::ErrorKind::WouldBlock),
                "accept before connect"
            );
        }
        let mut target = self.address;
        if target.ip().is_unspecified() {
            target.set_ip(match target {
                SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            });
        }
        let client = TcpStream::connect(target).explain("connect")?;
        eventually("a connection to accept", || {
            descriptors::poll(listener, libc::POLLIN, 0).is_ok_and(|events| events != 0)
        })?;
        let (server, _) = listener.accept().explain("accept")?;
        server.set_nonblocking(false).explain("O_NONBLOCK")?;
        exchange(client, server)
    }
}

/// A thread that waits in accept the whole time.
struct Blocked {
    address: SocketAddr,
    thread: thread::JoinHandle<Outcome<TcpStream>>,
}

impl Blocked {
    fn set_up() -> Outcome<Blocked> {
        // A plain accept on a plain socket, so that an EINTR is seen.
        // SAFETY: socket has no memory arguments.
        let socket = owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) });
        let listener = TcpListener::from(socket.explain("socket")?);
        // Listening without bind takes any port of any address.
        // SAFETY: listen has no memory arguments.
        checked(unsafe { libc::listen(listener.as_raw_fd(), 3) }).explain("listen")?;
        let mut address = listener.local_addr().explain("getsockname")?;
        address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let tid = Arc::new(AtomicI32::new(0));
        let its_tid = Arc::clone(&tid);
        let thread = thread::spawn(move || {
            its_tid.store(gettid(), Ordering::SeqCst);
            let none = std::ptr::null_mut;
            // SAFETY: the peer's address is not asked for.
            let result =
                unsafe { libc::accept(listener.as_raw_fd(), none(), std::ptr::null_mut()) };
            let connection: OwnedFd = owned(result).explain("accept returned early")?;
            Ok(TcpStream::from(connection))
        });
        eventually("start of the accepting thread", || {
            tid.load(Ordering::SeqCst) != 0
        })?;
        let calls = [libc::SYS_accept, libc::SYS_accept4];
        await_blocked(
            std::process::id() as i32,
            tid.load(Ordering::SeqCst),
            &calls,
        )?;
        Ok(Blocked { address, thread })
    }

    fn verify(self) -> Outcome {
        if self.thread.is_finished() {
            let early = self.thread.join();
            return Err(Failure::new(format!(
                "the blocked accept returned early: {early:?}"
            )));
        }
        let client = TcpStream::connect(self.address).explain("connect to the blocked accept")?;
        let server = self
            .thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("panicked")))?;
        exchange(client, server)
    }
}

fn exchange(mut client: TcpStream, mut server: TcpStream) -> Outcome {
    client.write_all(b"question").explain("send")?;
    let mut buffer = [0; 8];
    server.read_exact(&mut buffer).explain("receive")?;
    ensure_equal!(&buffer, b"question", "received by the server");
    server.write_all(b"response").explain("send")?;
    client.read_exact(&mut buffer).explain("receive")?;
    ensure_equal!(&buffer, b"response", "received by the client");
    Ok(())
}
