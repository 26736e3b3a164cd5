//! The pool of virtual addresses: which are taken and which comes next.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A network of which members of jobs with a virtual network get their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pool {
    base: u32,
    prefix: u8,
}

/// A text that is no usable IPv4 network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidPool(pub String);

impl fmt::Display for InvalidPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = &self.0;
        write!(
            f,
            "{text:?} is not an IPv4 network ADDRESS/8 to ADDRESS/30 with a clear host part"
        )
    }
}

impl std::error::Error for InvalidPool {}

impl Default for Pool {
    /// 10.177.128.0/17.
    fn default() -> Self {
        Pool {
            base: u32::from(Ipv4Addr::new(10, 177, 128, 0)),
            prefix: 17,
        }
    }
}

impl FromStr for Pool {
    type Err = InvalidPool;

    fn from_str(text: &str) -> Result<Self, InvalidPool> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let base = u32::from(address.parse::<Ipv4Addr>().ok()?);
            let prefix = prefix.parse::<u8>().ok()?;
            let usable = (8..=30).contains(&prefix) && base & (u32::MAX >> prefix) == 0;
            usable.then_some(Pool { base, prefix })
        });
        parsed.ok_or_else(|| InvalidPool(text.to_owned()))
    }
}

impl Pool {
    /// Length of the network's prefix, in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// `count` addresses that are not `taken`, the next ones behind `last` first; `None` when there
    /// are not so many. The network's own and its broadcast address are never given out.
    ///
    /// An address comes again as late as possible: the sockets of a job that has ended still speak
    /// for a while (RFC 9293, TIME-WAIT and retransmissions).
    pub(crate) fn allocate(
        &self,
        count: usize,
        taken: &BTreeSet<IpAddr>,
        last: Option<IpAddr>,
    ) -> Option<Vec<IpAddr>> {
        let hosts = (1u32 << (32 - self.prefix)) - 2;
        let begin = match last {
            Some(IpAddr::V4(last)) => u32::from(last).wrapping_sub(self.base) % hosts,
            _ => 0,
        };
        let free = (0..hosts)
            .map(|step| (begin + step) % hosts + 1)
            .map(|host| IpAddr::V4(Ipv4Addr::from(self.base + host)))
            .filter(|address| !taken.contains(address));
        let found: Vec<IpAddr> = free.take(count).collect();
        (found.len() == count).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_gives_each_address_once_and_says_when_it_is_empty() {
        let pool: Pool = "10.0.0.0/30".parse().unwrap();
        let first = pool.allocate(1, &BTreeSet::new(), None).unwrap();
        assert_eq!(first, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        let taken: BTreeSet<IpAddr> = first.into_iter().collect();
        assert_eq!(
            pool.allocate(1, &taken, None).unwrap(),
            ["10.0.0.2".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(pool.allocate(2, &taken, None), None);
    }

    #[test]
    fn an_address_comes_again_as_late_as_possible() {
        let pool: Pool = "10.0.0.0/29".parse().unwrap();
        let mut last = None;
        let mut given = Vec::new();
        for _ in 0..7 {
            let next = pool.allocate(1, &BTreeSet::new(), last).unwrap();
            last = next.last().copied();
            given.extend(next);
        }
        let hosts: Vec<String> = given.iter().map(ToString::to_string).collect();
        assert_eq!(hosts[0], "10.0.0.1");
        assert_eq!(hosts[5], "10.0.0.6");
        assert_eq!(hosts[6], "10.0.0.1");
        assert_eq!(
            pool.allocate(3, &BTreeSet::from([given[0]]), Some(given[4]))
                .unwrap(),
            [given[5], given[1], given[2]]
        );
    }

    #[test]
    fn a_text_with_host_bits_or_silly_prefix_is_refused() {
        for text in [
            "10.0.0.1/24",
            "10.0.0.0/31",
            "10.0.0.0",
            "::/64",
            "0.0.0.0/0",
        ] {
            assert!(text.parse::<Pool>().is_err(), "{text}");
        }
        assert_eq!("10.177.128.0/17".parse(), Ok(Pool::default()));
    }
}
