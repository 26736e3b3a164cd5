//! `Limits`: every bound and tuning value of an endpoint, with the reasons for the defaults.

use std::sync::Arc;
use std::time::Duration;

use crcoord_common::wire::MESSAGE_LIMIT;
use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// Smallest UDP payload QUIC allows (RFC 9000 section 14), in bytes.
const SMALLEST_MTU: u16 = 1200;

/// Largest UDP payload, in bytes. quinn 0.11 hands the kernel up to 10 datagrams in one call
/// (UDP_SEGMENT), which together may not exceed 65507 bytes (IPv4's largest datagram); beyond it the
/// kernel says EMSGSIZE, quinn takes that for a lost MTU probe, and whole batches vanish until the
/// path counts as a black hole and falls back to 1200 bytes: measured as a fifth of the throughput.
const LARGEST_MTU: u16 = 65507 / 10;

/// Bounds and tuning of one endpoint and all its connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a stream may hold unread. Above the bandwidth-delay product it only buys slack: 16 MiB
    /// is 100 Gbit/s for 1.3 ms.
    pub stream_window: u32,
    /// Bytes all streams of a connection may hold unread together. At least
    /// `2 * max_streams * stream_window`, so that bulk streams whose reader is stuck on a slow
    /// store cannot use up what heartbeats on the same connection need.
    pub connection_window: u64,
    /// Bytes sent and not yet acknowledged, all streams of a connection together: memory kept for
    /// retransmission, and the most a burst can ask of the peer's socket buffer.
    pub send_window: u64,
    /// Streams open at a time on one connection, in each direction, control included; opening one
    /// more waits.
    pub max_streams: u32,
    /// Silence after which a connection counts as lost. The smaller of both ends' values is used.
    pub idle: Duration,
    /// A packet is sent after this much silence; at most half of `idle`.
    pub keep_alive: Duration,
    /// UDP payload to begin with, in bytes. Only the default 1200 is sure to pass everywhere.
    pub initial_mtu: u16,
    /// Largest UDP payload that path MTU discovery tries, in bytes; at most 6550.
    pub max_mtu: u16,
    /// Bytes in flight before the first acknowledgement (congestion window at start).
    pub initial_window: u64,
    /// Receive and send buffer asked for on the UDP socket, in bytes.
    pub socket_buffer: usize,
    /// Time for a handshake until the peer has proved who it is and was admitted.
    pub handshake: Duration,
    /// Incoming handshakes at a time. From half of it on a client must first prove its address.
    pub max_handshakes: usize,
    /// Connections at a time, both directions, handshakes included.
    pub max_connections: usize,
    /// Largest message, in bytes.
    pub max_frame: u32,
    /// Largest body on a bulk stream, in bytes.
    pub max_body: u32,
}

impl Default for Limits {
    /// For agents, which send each other bulk data.
    fn default() -> Self {
        Limits {
            stream_window: 16 << 20,
            connection_window: 256 << 20,
            send_window: 8 << 20,
            max_streams: 8,
            idle: Duration::from_secs(10),
            keep_alive: Duration::from_secs(2),
            initial_mtu: SMALLEST_MTU,
            max_mtu: 6528, // fits jumbo frames of 9000 bytes; see LARGEST_MTU why not more
            initial_window: 1 << 20,
            socket_buffer: 8 << 20,
            handshake: Duration::from_secs(5),
            max_handshakes: 256,
            max_connections: 4096,
            max_frame: MESSAGE_LIMIT,
            max_body: 64 << 20,
        }
    }
}

/// A limit that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("limit {name} {reason}")]
pub struct InvalidLimit {
    /// The field of [`Limits`].
    pub name: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl Limits {
    /// For a coordinator, which never sees page data: many connections, small windows.
    pub fn control() -> Self {
        Limits {
            stream_window: 1 << 20,
            connection_window: 8 << 20,
            max_streams: 4,
            ..Limits::default()
        }
    }

    /// Refuses values that would break a promise made elsewhere.
    pub fn check(&self) -> Result<(), InvalidLimit> {
        let refuse = |name, reason: String| Err(InvalidLimit { name, reason });
        let floor = 2 * u64::from(self.max_streams) * u64::from(self.stream_window);
        if self.max_streams == 0 {
            return refuse("max_streams", "must not be 0".into());
        }
        if self.stream_window < 64 << 10 {
            return refuse("stream_window", "must be at least 64 KiB".into());
        }
        if self.connection_window < floor || self.connection_window >= 1 << 62 {
            let reason = format!("must be at least 2 * max_streams * stream_window = {floor}");
            return refuse("connection_window", reason);
        }
        if self.send_window < 64 << 10 {
            return refuse("send_window", "must be at least 64 KiB".into());
        }
        if self.idle.is_zero() || IdleTimeout::try_from(self.idle).is_err() {
            return refuse("idle", "must be above 0 and below 2^62 ms".into());
        }
        if self.keep_alive.is_zero() || self.keep_alive > self.idle / 2 {
            return refuse(
                "keep_alive",
                "must be above 0 and at most half of idle".into(),
            );
        }
        if self.initial_mtu < SMALLEST_MTU {
            return refuse("initial_mtu", format!("must be at least {SMALLEST_MTU}"));
        }
        if self.max_mtu < self.initial_mtu || self.max_mtu > LARGEST_MTU {
            let reason = format!("must lie between initial_mtu and {LARGEST_MTU}");
            return refuse("max_mtu", reason);
        }
        if self.handshake.is_zero() {
            return refuse("handshake", "must not be 0".into());
        }
        if self.max_handshakes < 2 || self.max_connections == 0 {
            return refuse(
                "max_handshakes",
                "must be at least 2, max_connections 1".into(),
            );
        }
        if self.max_frame == 0 {
            return refuse("max_frame", "must not be 0".into());
        }
        Ok(())
    }

    /// The QUIC settings. The limits must have passed `check`.
    ///
    /// Congestion control is CUBIC with a large initial window: in a cluster's own network the
    /// round trip is tens of microseconds and loss means a full switch queue, so a flow should
    /// begin near its fair share (1 MiB is 100 Gbit/s for 80 us) but must still back off when 32
    /// agents send to one. BBR in quinn is experimental and estimates badly at such round trips.
    pub(crate) fn transport(&self) -> Arc<TransportConfig> {
        let mut congestion = CubicConfig::default();
        congestion.initial_window(self.initial_window);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.max_mtu);
        let mut config = TransportConfig::default();
        config
            .stream_receive_window(self.stream_window.into())
            .receive_window(VarInt::from_u64(self.connection_window).unwrap_or(VarInt::MAX))
            .send_window(self.send_window)
            .max_concurrent_bidi_streams(self.max_streams.into())
            // One for the server's welcome.
            .max_concurrent_uni_streams(1u32.into())
            .datagram_receive_buffer_size(None)
            .max_idle_timeout(IdleTimeout::try_from(self.idle).ok())
            .keep_alive_interval(Some(self.keep_alive))
            // A lost first packet is sent again after three times this.
            .initial_rtt(Duration::from_millis(50))
            .initial_mtu(self.initial_mtu)
            .mtu_discovery_config(Some(discovery))
            .ack_frequency_config(Some(AckFrequencyConfig::default()))
            .congestion_controller_factory(Arc::new(congestion));
        Arc::new(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_presets_are_valid() {
        Limits::default().check().unwrap();
        Limits::control().check().unwrap();
    }

    #[test]
    fn values_that_break_a_promise_are_refused_by_name() {
        let limits = Limits {
            connection_window: 255 << 20,
            ..Limits::default()
        };
        assert_eq!(limits.check().unwrap_err().name, "connection_window");
        let limits = Limits {
            keep_alive: Duration::from_secs(6),
            ..Limits::default()
        };
        assert_eq!(limits.check().unwrap_err().name, "keep_alive");
        let limits = Limits {
            max_mtu: 8952,
            ..Limits::default()
        };
        assert_eq!(limits.check().unwrap_err().name, "max_mtu");
    }
}
