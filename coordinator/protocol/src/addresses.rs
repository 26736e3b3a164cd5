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

    /// `count` addresses that are not `taken`, lowest first; `None` when there are not so many. The
    /// network's own and its broadcast address are never given out.
    pub(crate) fn allocate(&self, count: usize, taken: &BTreeSet<IpAddr>) -> Option<Vec<IpAddr>> {
        let size = 1u32 << (32 - self.prefix);
        let free = (1..size - 1)
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
        let first = pool.allocate(1, &BTreeSet::new()).unwrap();
        assert_eq!(first, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        let taken: BTreeSet<IpAddr> = first.into_iter().collect();
        assert_eq!(
            pool.allocate(1, &taken).unwrap(),
            ["10.0.0.2".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(pool.allocate(2, &taken), None);
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
