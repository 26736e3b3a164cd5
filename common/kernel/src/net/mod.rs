//! Network side of a checkpoint: netlink, the network lock, socket lists and TCP repair.

pub mod fin;
pub mod lock;
pub mod netlink;
mod nf_tables;
pub mod sock_diag;
pub mod tcp_repair;
pub mod tcp_state;

#[cfg(test)]
mod lock_tests;
#[cfg(test)]
mod tcp_tests;
#[cfg(test)]
mod test_support;
