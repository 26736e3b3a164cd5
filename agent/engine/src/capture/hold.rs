//! The hold: network locked, every thread stopped.

use std::time::Duration;

use crcoord_common::report::Report;
use crcoord_common::wire::engine::CaptureTarget;
use crcoord_kernel::namespace::{Namespace, NamespaceKind};
use crcoord_kernel::net::lock::{NetworkLock, Scope};

use crate::error::{Result, failure, obstacle};
use crate::resources::mappings::ContentHashes;
use crate::resources::{descriptors, tcp};
use crate::tree::{HeldTree, discover};

/// A tree that stands still, with its network locked.
#[derive(Debug)]
pub struct Held {
    pub(super) target: CaptureTarget,
    pub(super) tree: HeldTree,
    pub(super) lock: Option<NetworkLock>,
    pub(super) hashes: ContentHashes,
}

impl Held {
    /// Locks the network and stops all threads; returns when both are in force.
    pub fn hold(target: CaptureTarget, hashes: ContentHashes) -> Result<Held> {
        let first = *discover(target.scope)
            .map_err(|error| failure("listing the process tree", &error))?
            .first()
            .ok_or_else(|| obstacle("engine-no-process", "there is no process to capture"))?;
        if target.own_network {
            // Set while the tree runs, so that the wait for all CPUs is not part of the freeze.
            let namespace = Namespace::of_process(first, NamespaceKind::Network)
                .map_err(|error| lock_failed(&error))?;
            let pending = NetworkLock::begin(Some(namespace_fd(&namespace)), Scope::WholeNamespace)
                .map_err(|error| lock_failed(&error))?;
            let lock = pending.wait().map_err(|error| lock_failed(&error))?;
            let tree = HeldTree::hold(target.scope)?;
            return Ok(Held {
                target,
                tree,
                lock: Some(lock),
                hashes,
            });
        }
        let tree = HeldTree::hold(target.scope)?;
        let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
        let descriptions = descriptors::scan(&pids, 0)?;
        let endpoints = tcp::endpoints(first, &descriptions)?;
        let lock = if endpoints.is_empty() {
            None
        } else {
            let namespace = Namespace::of_process(first, NamespaceKind::Network)
                .map_err(|error| lock_failed(&error))?;
            Some(
                NetworkLock::connections(Some(namespace_fd(&namespace)), &endpoints)
                    .map_err(|error| lock_failed(&error))?,
            )
        };
        Ok(Held {
            target,
            tree,
            lock,
            hashes,
        })
    }

    /// How long the tree has stood still.
    pub fn elapsed(&self) -> Duration {
        self.tree.since.elapsed()
    }
}

fn namespace_fd(namespace: &Namespace) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(namespace)
}

fn lock_failed(error: &dyn std::error::Error) -> Report {
    obstacle(
        "engine-network-lock",
        format!("the network cannot be locked: {error}"),
    )
    .remedy("load nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)")
}
