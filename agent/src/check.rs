//! Probes of this node for `crcoord check`: what is there, and what would keep checkpoints or
//! restarts from working, each with its remedy. Blocks.

use std::time::{Duration, SystemTime};

use crcoord_common::report::{Class, Report};
use crcoord_kernel::net::lock::NetworkLock;
use crcoord_kernel::pagemap::PageMap;

use crate::bulk_server::no_room;
use crate::network;
use crate::node::Node;

/// Capabilities that engine and capsules need, by their numbers (`capabilities(7)`).
const CAPABILITIES: &[(u32, &str, &str)] = &[
    (0, "CAP_CHOWN", "give files back to their owners"),
    (6, "CAP_SETGID", "start programs as their owners"),
    (7, "CAP_SETUID", "start programs as their owners"),
    (
        12,
        "CAP_NET_ADMIN",
        "lock networks and repair TCP connections",
    ),
    (19, "CAP_SYS_PTRACE", "freeze and read processes"),
    (21, "CAP_SYS_ADMIN", "make and enter namespaces"),
];
const CHECKPOINT_RESTORE: u32 = 40;
/// A certificate that ends within this time is told.
const CERTIFICATE_WARNING: Duration = Duration::from_secs(30 * 86400);

/// Everything that was found, good news as notes.
pub fn findings(node: &Node) -> Vec<Report> {
    let mut findings = vec![kernel()];
    findings.extend(capabilities());
    findings.extend(page_map());
    findings.extend(network_lock());
    findings.extend(virtual_network(node));
    findings.extend(cgroup(node));
    findings.extend(store(node));
    findings.extend(certificate(node));
    findings
        .into_iter()
        .map(|finding| node.here(finding))
        .collect()
}

fn kernel() -> Report {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let numbers: Vec<u32> = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok())
        .take(2)
        .collect();
    // clone3 with set_tid since 5.5, CAP_CHECKPOINT_RESTORE since 5.9, owned nf_tables since 5.12.
    match numbers.as_slice() >= [5, 12].as_slice() {
        true => note("check-kernel", format!("kernel {release}")),
        false => obstacle("check-kernel", format!("kernel {release} is too old"))
            .remedy("run Linux 5.12 or later"),
    }
}

fn capabilities() -> Vec<Report> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0);
    let has = |number: u32| effective & (1 << number) != 0;
    let mut findings: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(number, _, _)| !has(*number))
        .map(|(_, name, purpose)| {
            obstacle(
                "check-capability",
                format!("{name} is missing, needed to {purpose}"),
            )
            .remedy("run the agent as root")
        })
        .collect();
    if !has(CHECKPOINT_RESTORE) && !has(21) {
        findings.push(
            obstacle(
                "check-capability",
                "CAP_CHECKPOINT_RESTORE is missing, needed to give pids",
            )
            .remedy("run the agent as root"),
        );
    }
    findings
}

/// PAGEMAP_SCAN (Linux 6.7) makes incremental checkpoints possible; without it all works, slower.
fn page_map() -> Option<Report> {
    match PageMap::open(std::process::id().cast_signed()) {
        Ok(map) if map.has_scan() => None,
        Ok(_) => Some(note(
            "check-pagemap-scan",
            "PAGEMAP_SCAN is missing: memory is found slower",
        )),
        Err(error) => Some(
            obstacle(
                "check-pagemap",
                format!("/proc/PID/pagemap cannot be read: {error}"),
            )
            .remedy("run the agent as root"),
        ),
    }
}

fn network_lock() -> Option<Report> {
    NetworkLock::supported().err().map(|error| {
        obstacle("check-network-lock", error.to_string())
            .remedy("load nf_tables, and run the agent with CAP_NET_ADMIN")
    })
}

fn virtual_network(node: &Node) -> Option<Report> {
    let outcome = node
        .uplink()
        .and_then(|uplink| network::probe(&uplink).map(|()| uplink));
    Some(match outcome {
        Ok(uplink) => note("check-uplink", format!("virtual networks on {uplink}")),
        // Jobs in the node's own network run all the same.
        Err(error) => Report {
            class: Class::Note,
            ..error.report()
        },
    })
}

fn cgroup(node: &Node) -> Option<Report> {
    match &node.cgroups {
        Some(_) => None,
        None => Some(
            note("check-cgroup", "capsules have no cgroup of their own")
                .remedy("mount cgroup2, and give the agent's unit Delegate=yes"),
        ),
    }
}

fn store(node: &Node) -> Vec<Report> {
    let mut findings = Vec::new();
    let stores = [
        (Some(&node.store), node.settings.store_dir.clone()),
        (
            node.shared.as_ref(),
            node.settings.shared_dir.clone().unwrap_or_default(),
        ),
    ];
    for (store, directory) in stores {
        let Some(store) = store else {
            continue;
        };
        let path = directory.display().to_string();
        findings.push(match store.free_bytes() {
            Ok(free) if free < node.settings.min_free_bytes => {
                no_room(free, node.settings.min_free_bytes).path(path)
            }
            Ok(free) => note("check-store", format!("store has {free} bytes free")).path(path),
            Err(error) => Report {
                class: Class::Obstacle,
                ..error.report()
            },
        });
    }
    findings
}

fn certificate(node: &Node) -> Option<Report> {
    let expires = node.endpoint.identity().expires();
    let left = expires
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    (left < CERTIFICATE_WARNING).then(|| {
        note(
            "check-certificate",
            format!("the certificate ends in {} days", left.as_secs() / 86400),
        )
        .remedy("issue a new one (crcoord pki issue)")
    })
}

fn note(code: &str, text: impl Into<String>) -> Report {
    Report::new(code, Class::Note, text)
}

fn obstacle(code: &str, text: impl Into<String>) -> Report {
    Report::new(code, Class::Obstacle, text)
}
