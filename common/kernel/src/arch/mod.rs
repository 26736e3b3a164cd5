//! Everything that differs between CPU architectures: registers, injected code, signal frames.
//! A port adds one file here.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("crcoord's engine knows x86_64 only; see common/kernel/src/arch");
