//! Placement: which node each member of a restarted job is built on.
//!
//! A member stays where its data and its node are; one whose node is lost goes to a free node, of
//! those to one that holds its data, then to the one with the fewest members. Never two members of
//! one job on one node.

use std::collections::{BTreeMap, BTreeSet};

use crcoord_common::ids::{MemberId, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::member::{MemberCommit, Replica};

/// A living node and the number of members it runs.
pub(crate) type Living = BTreeMap<NodeName, u32>;

/// Chooses a node for every member, or says all that is in the way.
pub(crate) fn choose(
    members: &[MemberCommit],
    living: &Living,
) -> Result<BTreeMap<MemberId, NodeName>, Vec<Report>> {
    let mut chosen = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for member in members {
        if living.contains_key(&member.node) && taken.insert(member.node.clone()) {
            chosen.insert(member.member, member.node.clone());
        }
    }
    let mut obstacles = Vec::new();
    for member in members {
        if chosen.contains_key(&member.member) {
            continue;
        }
        let free = living.iter().filter(|(node, _)| !taken.contains(*node));
        let best = free.min_by_key(|(node, load)| (!holds(member, node), **load, (*node).clone()));
        match best {
            Some((node, _)) => {
                taken.insert(node.clone());
                chosen.insert(member.member, node.clone());
            }
            None => obstacles.push(no_spare(member)),
        }
    }
    obstacles.extend(
        members
            .iter()
            .filter_map(|member| no_source(member, living)),
    );
    match obstacles.is_empty() {
        true => Ok(chosen),
        false => Err(obstacles),
    }
}

/// Takes the caller's nodes, one per member in member order, or says all that is in the way.
pub(crate) fn accept(
    members: &[MemberCommit],
    nodes: &[NodeName],
    living: &Living,
) -> Result<BTreeMap<MemberId, NodeName>, Vec<Report>> {
    if nodes.len() != members.len() {
        let (given, wanted) = (nodes.len(), members.len());
        return Err(vec![
            Report::new(
                "restart-node-count",
                Class::Usage,
                format!("{given} nodes are given for {wanted} members"),
            )
            .remedy("give one node per member, or none for automatic placement"),
        ]);
    }
    let mut obstacles = distinct_and_living(nodes, living);
    obstacles.extend(
        members
            .iter()
            .filter_map(|member| no_source(member, living)),
    );
    match obstacles.is_empty() {
        true => Ok(members
            .iter()
            .map(|member| member.member)
            .zip(nodes.iter().cloned())
            .collect()),
        false => Err(obstacles),
    }
}

/// What is wrong with a list of nodes that get one member each.
pub(crate) fn distinct_and_living(nodes: &[NodeName], living: &Living) -> Vec<Report> {
    let mut seen = BTreeSet::new();
    let mut obstacles = Vec::new();
    for node in nodes {
        if !seen.insert(node) {
            let what = "two members of one job cannot be on one node";
            obstacles.push(
                Report::new("placement-node-twice", Class::Usage, what)
                    .on_node(node)
                    .remedy("name each node once"),
            );
        } else if !living.contains_key(node) {
            obstacles.push(
                Report::new(
                    "node-not-connected",
                    Class::Unreachable,
                    "its agent is not connected",
                )
                .on_node(node)
                .remedy("start crcoord agent there, or choose another node"),
            );
        }
    }
    obstacles
}

fn holds(member: &MemberCommit, node: &NodeName) -> bool {
    member
        .replicas
        .iter()
        .any(|replica| matches!(replica, Replica::Node(holder) if holder == node))
}

fn no_source(member: &MemberCommit, living: &Living) -> Option<Report> {
    let reachable = member.replicas.iter().any(|replica| match replica {
        Replica::Node(node) => living.contains_key(node),
        Replica::Shared => true,
    });
    if reachable {
        return None;
    }
    let holders: Vec<&str> = member
        .replicas
        .iter()
        .filter_map(|replica| match replica {
            Replica::Node(node) => Some(node.as_str()),
            Replica::Shared => None,
        })
        .collect();
    let number = member.member;
    let text = format!("no copy of member {number} can be reached; its copies are on {holders:?}");
    Some(
        Report::new("restart-no-copy", Class::Obstacle, text)
            .on_node(&member.node)
            .remedy("bring one of these nodes back, or restart from another epoch with --epoch"),
    )
}

fn no_spare(member: &MemberCommit) -> Report {
    let number = member.member;
    let text = format!(
        "member {number} has no node: its own is lost and every connected node has a member of \
         this job"
    );
    Report::new("restart-no-spare", Class::Obstacle, text)
        .on_node(&member.node)
        .remedy("bring its node back, or start crcoord agent on a spare node")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crcoord_common::image::ChunkId;

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    fn member(number: u32, at: &str, copies: &[&str]) -> MemberCommit {
        MemberCommit {
            member: MemberId(number),
            node: node(at),
            manifest: ChunkId([0; 32]),
            replicas: copies
                .iter()
                .map(|name| Replica::Node(node(name)))
                .collect(),
            raw_bytes: 0,
            stored_bytes: 0,
            freeze_us: 0,
            connections: Vec::new(),
        }
    }

    fn ring() -> Vec<MemberCommit> {
        vec![
            member(0, "n1", &["n1", "n2"]),
            member(1, "n2", &["n2", "n3"]),
            member(2, "n3", &["n3", "n1"]),
        ]
    }

    fn living(nodes: &[(&str, u32)]) -> Living {
        nodes
            .iter()
            .map(|(name, load)| (node(name), *load))
            .collect()
    }

    #[test]
    fn members_stay_and_the_lost_one_goes_to_the_spare() {
        let chosen = choose(&ring(), &living(&[("n1", 1), ("n3", 1), ("n4", 0)])).unwrap();
        let nodes: Vec<_> = chosen.values().map(NodeName::as_str).collect();
        assert_eq!(nodes, ["n1", "n4", "n3"]);
    }

    #[test]
    fn a_free_holder_of_the_data_is_preferred_to_an_idle_node() {
        let members = [member(0, "n1", &["n1", "n9"])];
        let chosen = choose(&members, &living(&[("n2", 0), ("n9", 7)])).unwrap();
        assert_eq!(chosen[&MemberId(0)], node("n9"));
    }

    #[test]
    fn without_a_spare_the_member_and_its_node_are_named() {
        let obstacles = choose(&ring(), &living(&[("n1", 1), ("n3", 1)])).unwrap_err();
        assert_eq!(obstacles.len(), 1);
        assert_eq!(obstacles[0].code, "restart-no-spare");
        assert_eq!(obstacles[0].place.node, Some(node("n2")));
    }

    #[test]
    fn a_member_whose_copies_are_all_lost_is_an_obstacle() {
        let obstacles = choose(&ring(), &living(&[("n1", 0), ("n4", 0), ("n5", 0)])).unwrap_err();
        assert_eq!(obstacles.len(), 1);
        assert_eq!(obstacles[0].code, "restart-no-copy");
    }

    #[test]
    fn given_nodes_are_checked() {
        let all = living(&[("n1", 0), ("n2", 0), ("n3", 0)]);
        let codes = |nodes: &[&str]| {
            let nodes: Vec<_> = nodes.iter().map(|name| node(name)).collect();
            let reports = accept(&ring(), &nodes, &all).unwrap_err();
            reports
                .into_iter()
                .map(|report| report.code)
                .collect::<Vec<_>>()
        };
        assert_eq!(codes(&["n1"]), ["restart-node-count"]);
        assert_eq!(
            codes(&["n1", "n1", "n9"]),
            ["placement-node-twice", "node-not-connected"]
        );
    }
}
