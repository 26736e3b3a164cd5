//! Typed access to the options of a socket that this process holds.
