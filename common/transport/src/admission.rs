//! Admission of incoming connections, so that half-open ones cannot exhaust the daemon.
//!
//! ```text
//! first packet -> too many connections? -> refused
//!              -> half of the handshakes taken and the sender's address unproved? -> retry packet
//!                 (the client comes again with a token; nothing is kept of it here)
//!              -> all handshakes taken? -> ignored (the client repeats its packet and may get in)
//!              -> handshake, bounded in time -> certificate -> welcome -> queue of `accept`
//! ```

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connecting, Incoming, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::connect::verified_peer;
use crate::connection::{CLOSE_PROTOCOL, Connection};
use crate::endpoint::WELCOME;
use crate::limits::Limits;

/// Runs until the endpoint is closed; handshakes under way end with it.
pub(crate) async fn run(
    endpoint: quinn::Endpoint,
    limits: Arc<Limits>,
    admitted: mpsc::Sender<Connection>,
) {
    let handshakes = Arc::new(Semaphore::new(limits.max_handshakes));
    let log = Arc::new(RefusalLog::default());
    let mut tasks = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            Some(_) = tasks.join_next() => continue,
        };
        let Some(incoming) = incoming else { break };
        let address = incoming.remote_address();
        // Counted by quinn with those that are still in their handshake.
        if endpoint.open_connections() >= limits.max_connections {
            log.refused(address, "max_connections are open");
            incoming.refuse();
            continue;
        }
        let Some((connecting, share)) = begin(incoming, &handshakes, &limits, &log) else {
            continue;
        };
        let (limits, admitted, log) = (limits.clone(), admitted.clone(), log.clone());
        tasks.spawn(async move {
            let handshake = tokio::time::timeout(limits.handshake, admit(connecting, &limits));
            match handshake.await {
                Ok(Ok(connection)) => {
                    // With the share kept until there is room, a daemon that does not call
                    // `accept` is not flooded either. Fails only when the endpoint is dropped.
                    let _ = admitted.send(connection).await;
                }
                Ok(Err(reason)) => log.refused(address, &reason),
                Err(_) => log.refused(address, "handshake not finished in time"),
            }
            drop(share);
        });
    }
}

fn begin(
    incoming: Incoming,
    handshakes: &Arc<Semaphore>,
    limits: &Limits,
    log: &RefusalLog,
) -> Option<(Connecting, OwnedSemaphorePermit)> {
    let address = incoming.remote_address();
    let busy = handshakes.available_permits() <= limits.max_handshakes / 2;
    if busy && !incoming.remote_address_validated() {
        if let Err(error) = incoming.retry() {
            error.into_incoming().ignore();
        }
        return None;
    }
    let Ok(share) = handshakes.clone().try_acquire_owned() else {
        incoming.ignore();
        return None;
    };
    match incoming.accept() {
        Ok(connecting) => Some((connecting, share)),
        Err(error) => {
            log.refused(address, &error.to_string());
            None
        }
    }
}

async fn admit(connecting: Connecting, limits: &Arc<Limits>) -> Result<Connection, String> {
    let quic = connecting.await.map_err(|error| error.to_string())?;
    let peer = match verified_peer(&quic) {
        Ok(peer) => peer,
        Err(error) => {
            quic.close(VarInt::from_u32(CLOSE_PROTOCOL), b"no usable certificate");
            return Err(error.to_string());
        }
    };
    let mut welcome = quic.open_uni().await.map_err(|error| error.to_string())?;
    welcome
        .write_all(WELCOME)
        .await
        .map_err(|error| error.to_string())?;
    welcome.finish().map_err(|error| error.to_string())?;
    Ok(Connection::new(quic, peer, limits.clone()))
}

/// Logs refusals, at most [`RefusalLog::BURST`] per [`RefusalLog::PERIOD`]: strangers must not be
/// able to fill the log.
#[derive(Debug, Default)]
struct RefusalLog(Mutex<Option<Period>>);

#[derive(Debug)]
struct Period {
    began: Instant,
    refusals: u64,
}

impl RefusalLog {
    const PERIOD: Duration = Duration::from_secs(10);
    const BURST: u64 = 20;

    fn refused(&self, address: SocketAddr, reason: &str) {
        let now = Instant::now();
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let period = match slot.take() {
            Some(period) if now.duration_since(period.began) < Self::PERIOD => period,
            ended => {
                let hidden = ended.map_or(0, |old| old.refusals.saturating_sub(Self::BURST));
                if hidden > 0 {
                    tracing::warn!(hidden, "more connections were refused");
                }
                Period {
                    began: now,
                    refusals: 0,
                }
            }
        };
        let period = slot.insert(period);
        period.refusals += 1;
        if period.refusals <= Self::BURST {
            tracing::warn!(%address, reason, "incoming connection refused");
        }
    }
}
