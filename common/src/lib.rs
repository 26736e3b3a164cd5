//! Pure data shared by every part of crcoord: ids, reports, configuration, wire messages and
//! the image container. No I/O besides reading a configuration file, no threads, no clock.
#![forbid(unsafe_code)]

pub mod commit;
pub mod config;
pub mod exit;
pub mod hostlist;
pub mod ids;
pub mod image;
pub mod report;
pub mod units;
pub mod wire;
