//! What a daemon and its service manager tell each other: ready, alive, stopping (sd_notify(3)).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;

/// Tells the service manager a state such as `READY=1`; does nothing where there is none.
fn notify(state: &str) {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(path.as_bytes(), state)
    {
        tracing::warn!(%error, state, "the service manager could not be told");
    }
}

fn send(path: &[u8], state: &str) -> std::io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Tells the service manager that this daemon is ready and, if it asked for that, that it is alive.
/// The future is done when the daemon is asked to end.
pub fn until_stopped() -> Result<impl Future<Output = ()> + Send, Failure> {
    // Registered before anybody is told that this daemon may be stopped.
    let mut asked = Box::pin(asked_to_stop()?);
    notify("READY=1");
    Ok(async move {
        match watchdog_period() {
            None => asked.await,
            Some(period) => {
                let mut ticks = tokio::time::interval(period / 2);
                loop {
                    tokio::select! {
                        () = &mut asked => break,
                        _ = ticks.tick() => notify("WATCHDOG=1"),
                    }
                }
            }
        }
        notify("STOPPING=1");
    })
}

fn watchdog_period() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let period = number("WATCHDOG_USEC").filter(|period| *period > 1)?;
    ours.then(|| Duration::from_micros(period))
}

/// From now on SIGTERM and SIGINT do not end this process but the future, which waits for them.
pub fn asked_to_stop() -> Result<impl Future<Output = ()> + Send, Failure> {
    let wait = |error| Failure::internal("cannot wait for signals", &error);
    let mut terminate = signal(SignalKind::terminate()).map_err(wait)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(wait)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_reaches_both_kinds_of_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("crcoord-notify-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, address) in [
            (
                UnixDatagram::bind(&path).unwrap(),
                path.display().to_string(),
            ),
            (
                UnixDatagram::bind_addr(&abstract_name).unwrap(),
                format!("@{name}"),
            ),
        ] {
            send(address.as_bytes(), "READY=1").unwrap();
            let mut bytes = [0; 16];
            let length = socket.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"READY=1");
        }
    }
}
