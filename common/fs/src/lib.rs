//! Files at the cut and at restart: which file it is, and putting it back to what it was.
//!
//! Today every filesystem is treated alike; drivers (detection, quiescing, snapshots, relinks, pins)
//! will be one file each here.
#![forbid(unsafe_code)]

pub mod identity;
pub mod rollback;
