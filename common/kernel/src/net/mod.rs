//! Network side of a checkpoint: netlink, the network lock, socket lists and TCP repair.
