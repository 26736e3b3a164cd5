//! A FIN in the name of a peer that cannot send it again: put into a rebuilt connection by a raw
//! socket.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::tcp_state::{TcpState, sockaddr};

const TCP_HEADER: usize = 20;
/// FIN and ACK bits of a TCP header (RFC 9293, 3.1).
const FIN_ACK: u8 = 0x11;

/// Makes the connection see the end of its peer's data, where the peer had sent its FIN before the
/// cut and is not rebuilt.
///
/// To be called in the socket's network namespace, after the network lock was lifted and
/// [`finish`](super::tcp_state::Rebuilt::finish) was called. The segment comes from this machine and
/// goes over loopback, so no router nor filter between nodes sees it. CAP_NET_RAW is needed.
///
/// # Errors
/// What socket(2) and sendto(2) say; `InvalidInput` for addresses of different families.
pub fn inject_fin(state: &TcpState) -> io::Result<()> {
    let (local, peer) = (canonical(state.local), canonical(state.peer));
    let segment = fin_segment(state, local, peer);
    let (family, packet) = match (local.ip(), peer.ip()) {
        (IpAddr::V4(to), IpAddr::V4(from)) => {
            let mut header = [0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&((20 + TCP_HEADER) as u16).to_be_bytes());
            header[8] = 64;
            header[9] = libc::IPPROTO_TCP as u8;
            // raw(7): the kernel fills in the checksum and the id.
            header[12..16].copy_from_slice(&from.octets());
            header[16..20].copy_from_slice(&to.octets());
            (libc::AF_INET, [&header[..], &segment].concat())
        }
        (IpAddr::V6(to), IpAddr::V6(from)) => {
            let mut header = [0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&(TCP_HEADER as u16).to_be_bytes());
            header[6] = libc::IPPROTO_TCP as u8;
            header[7] = 64;
            header[8..24].copy_from_slice(&from.octets());
            header[24..40].copy_from_slice(&to.octets());
            (libc::AF_INET6, [&header[..], &segment].concat())
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    // IPPROTO_RAW: the packet comes with its own header (raw(7), ipv6(7)).
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe {
        libc::socket(
            family,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::IPPROTO_RAW,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // ipv6(7): the port of the destination of a raw socket must be zero or the protocol.
    let (address, length) = sockaddr({
        let mut to = local;
        to.set_port(0);
        to
    });
    // SAFETY: packet and address are initialised for the lengths given and only read.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        v4 @ IpAddr::V4(_) => SocketAddr::new(v4, address.port()),
        IpAddr::V6(_) => address,
    }
}

/// The TCP header, checksum included. Without a timestamp option: Linux checks the option only
/// where it is present (`tcp_validate_incoming`).
fn fin_segment(state: &TcpState, local: SocketAddr, peer: SocketAddr) -> [u8; TCP_HEADER] {
    let window = (state.window.send >> state.options.send_scale).min(u32::from(u16::MAX)) as u16;
    let mut segment = [0; TCP_HEADER];
    segment[0..2].copy_from_slice(&peer.port().to_be_bytes());
    segment[2..4].copy_from_slice(&local.port().to_be_bytes());
    segment[4..8].copy_from_slice(&state.received_sequence.to_be_bytes());
    segment[8..12].copy_from_slice(&state.acknowledged_sequence.to_be_bytes());
    segment[12] = ((TCP_HEADER / 4) as u8) << 4;
    segment[13] = FIN_ACK;
    segment[14..16].copy_from_slice(&window.to_be_bytes());
    let checksum = checksum(peer.ip(), local.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}

/// The Internet checksum over pseudo header and segment (RFC 9293, 3.1).
fn checksum(from: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let pseudo = [0, libc::IPPROTO_TCP as u8, 0, segment.len() as u8];
    let bytes = [&octets(from), &octets(to), &pseudo[..], segment].concat();
    let mut sum: u32 = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_with_its_checksum_sums_to_zero() {
        let (from, to) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut segment: Vec<u8> = (0..20).collect();
        segment[16..18].fill(0);
        let sum = checksum(from, to, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(from, to, &segment), 0);
    }
}
