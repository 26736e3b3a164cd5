//! Starting a member's program in a new capsule, and adopting a running tree.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crcoord_common::ids::MemberKey;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::FromAgent;
use crcoord_common::wire::member::{CapsuleSpec, Command, MemberNetwork, Stdio};

use super::{Body, Member, drop_remains, follow, short_name, write_record};
use crate::capsule::protocol::{Answer, Ask, Order};
use crate::capsule::{Capsule, CapsuleError};
use crate::members::Adopted;
use crate::network;
use crate::node::{Node, blocking};

/// Longest path of a unix socket (`unix(7)`: 108 bytes with the zero at its end).
const SOCKET_PATH_LIMIT: usize = 107;

/// Starts a member.
///
/// # Errors
/// A report; nothing is left then.
pub async fn start(
    node: &Arc<Node>,
    key: MemberKey,
    spec: CapsuleSpec,
    command: Command,
) -> Result<FromAgent, Report> {
    let _gate = node.members.gate(&key).await;
    if let Some(member) = node.members.get(&key) {
        return already_started(&member).await;
    }
    node.members.refuse_second_life(&key)?;
    let member = make_capsule(node, key, spec).await?;
    let command = completed(node, &member, command);
    let started = {
        let member = member.clone();
        blocking(move || ask_to_start(&member, command)).await
    };
    match started {
        Ok(pid) => {
            follow(node, &member);
            tracing::info!(member = %member.key, pid, "started");
            Ok(FromAgent::Started {
                pid,
                owner: member.owner.clone(),
            })
        }
        Err(report) => {
            discard(node, &member).await;
            Err(report)
        }
    }
}

/// Makes a member's capsule with its network and writes it down; the caller holds the gate.
///
/// # Errors
/// A report; nothing is left then.
pub async fn make_capsule(
    node: &Arc<Node>,
    key: MemberKey,
    spec: CapsuleSpec,
) -> Result<Arc<Member>, Report> {
    node.members.refuse_second_life(&key)?;
    let made = {
        let (node, key, spec) = (node.clone(), key.clone(), spec.clone());
        blocking(move || build(&node, &key, &spec)).await
    };
    let capsule = made?;
    let owner = spec.owner.clone();
    let member = Member::new(
        key,
        Body::Capsule {
            capsule,
            spec: Box::new(spec),
        },
        owner,
        None,
    );
    node.members.insert(member.clone());
    if let Err(error) = write_record(node, &member).await {
        discard(node, &member).await;
        return Err(Report::new(
            "agent-state",
            Class::Failure,
            format!("writing state: {error}"),
        )
        .errno(error.raw_os_error())
        .remedy("make room in the agent's run directory"));
    }
    Ok(member)
}

/// Takes everything of a member back that never ran or must not run.
pub(crate) async fn discard(node: &Arc<Node>, member: &Arc<Member>) {
    node.members.remove(&member.key);
    drop_remains(node, member).await;
}

/// Takes a running tree as a member.
///
/// # Errors
/// A report.
pub async fn adopt(
    node: &Arc<Node>,
    key: MemberKey,
    pid: i32,
    caller: u32,
) -> Result<FromAgent, Report> {
    let _gate = node.members.gate(&key).await;
    if let Some(member) = node.members.get(&key) {
        return match &member.body {
            Body::Adopted(adopted) if adopted.pid == pid => Ok(FromAgent::Started {
                pid,
                owner: member.owner.clone(),
            }),
            _ => Err(Report::new(
                "agent-member-exists",
                Class::Usage,
                "there is such a member",
            )),
        };
    }
    node.members.refuse_second_life(&key)?;
    let (adopted, owner) = blocking(move || Adopted::take(pid, caller)).await?;
    let member = Member::new(key, Body::Adopted(adopted), owner, None);
    write_record(node, &member).await.map_err(|error| {
        Report::new(
            "agent-state",
            Class::Failure,
            format!("writing state: {error}"),
        )
        .errno(error.raw_os_error())
    })?;
    node.members.insert(member.clone());
    follow(node, &member);
    Ok(FromAgent::Started {
        pid,
        owner: member.owner.clone(),
    })
}

/// A request that came twice, as after a lost link, is answered again.
async fn already_started(member: &Arc<Member>) -> Result<FromAgent, Report> {
    let owner = member.owner.clone();
    let member = member.clone();
    let pid = blocking(move || match &member.body {
        Body::Capsule { capsule, .. } => {
            let status = capsule.status().ok();
            status
                .and_then(|status| capsule.host_pid(status.root?))
                .unwrap_or(0)
        }
        Body::Adopted(adopted) => adopted.pid,
        Body::Gone => 0,
    })
    .await;
    Ok(FromAgent::Started { pid, owner })
}

fn build(node: &Node, key: &MemberKey, spec: &CapsuleSpec) -> Result<Capsule, Report> {
    let id = short_name(key);
    let socket = node.run_path("capsules", &format!("{id}.sock"));
    if socket.as_os_str().len() > SOCKET_PATH_LIMIT {
        return Err(Report::new(
            "agent-run-dir",
            Class::Usage,
            "the run directory's path is too long",
        )
        .path(socket.display().to_string())
        .remedy("set agent.run_dir to a short path"));
    }
    let hosts = match &spec.network {
        MemberNetwork::Host => None,
        MemberNetwork::Virtual { .. } => Some(write_hosts(node, &id, spec).map_err(|error| {
            Report::new(
                "agent-hosts",
                Class::Failure,
                format!("writing the hosts file: {error}"),
            )
            .errno(error.raw_os_error())
        })?),
    };
    let cgroup = node.cgroups.as_ref().and_then(|cgroups| {
        cgroups
            .create(&id)
            .inspect_err(|error| tracing::warn!(member = %key, %error, "no cgroup of its own"))
            .ok()
    });
    let order = Order {
        socket: socket.display().to_string(),
        hostname: spec.hostname.clone(),
        own_network: matches!(spec.network, MemberNetwork::Virtual { .. }),
        hosts: hosts.map(|path| path.display().to_string()),
        cgroup: cgroup.map(|path| path.display().to_string()),
        owner: spec.owner.clone(),
        stdio: with_patterns_replaced(&spec.stdio, node, key),
        run_lease_ms: spec.run_lease_ms,
    };
    let capsule = Capsule::create(&node.image, &id, &order).map_err(|error| error.report())?;
    if let MemberNetwork::Virtual { address, prefix } = spec.network {
        let connected = node
            .uplink()
            .and_then(|uplink| network::connect(&uplink, capsule.init, address, prefix));
        if let Err(error) = connected {
            let gone = capsule.kill(node.settings.kill_patience);
            if let Err(error) = gone {
                tracing::error!(member = %key, %error, "a capsule without network is left");
            }
            return Err(error.report());
        }
    }
    Ok(capsule)
}

fn write_hosts(node: &Node, id: &str, spec: &CapsuleSpec) -> io::Result<PathBuf> {
    let own = match fs::read_to_string("/etc/hosts") {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let path = node.run_path("capsules", &format!("{id}.hosts"));
    fs::write(
        &path,
        network::hosts(&own, &spec.hostname, &spec.placements),
    )?;
    // The program reads it as its owner, whatever the agent's own umask is.
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    Ok(path)
}

fn with_patterns_replaced(stdio: &Stdio, node: &Node, key: &MemberKey) -> Stdio {
    let replaced = |pattern: &str| {
        pattern
            .replace("%j", key.job.id.as_str())
            .replace("%m", &key.member.to_string())
            .replace("%n", node.settings.node.as_str())
    };
    match stdio {
        Stdio::Files { output, error } => Stdio::Files {
            output: replaced(output),
            error: replaced(error),
        },
        Stdio::Caller => Stdio::Caller,
    }
}

/// The command with the variables that every member sees.
fn completed(node: &Node, member: &Member, mut command: Command) -> Command {
    let Body::Capsule { spec, .. } = &member.body else {
        return command;
    };
    let list = |one: &dyn Fn(&crcoord_common::wire::member::Placement) -> String| {
        spec.placements
            .iter()
            .map(one)
            .collect::<Vec<_>>()
            .join(",")
    };
    let variables = [
        ("CRCOORD_JOB", member.key.job.id.to_string()),
        ("CRCOORD_MEMBER", member.key.member.to_string()),
        ("CRCOORD_MEMBERS", spec.placements.len().to_string()),
        ("CRCOORD_NODE", node.settings.node.to_string()),
        (
            "CRCOORD_NODES",
            list(&|placement| placement.node.to_string()),
        ),
        (
            "CRCOORD_ADDRESSES",
            list(&|placement| placement.address.to_string()),
        ),
    ];
    command
        .environment
        .extend(variables.map(|(name, value)| (name.to_owned(), value)));
    command
}

/// Pid of the started program on the node; 0 when it has ended already.
fn ask_to_start(member: &Member, command: Command) -> Result<i32, Report> {
    let Some(capsule) = member.capsule() else {
        return Err(Report::new(
            "agent-start",
            Class::Failure,
            "the member has no capsule",
        ));
    };
    match capsule
        .ask(&Ask::Start { command })
        .map_err(|error| error.report())?
    {
        Answer::Started { pid } => Ok(capsule.host_pid(pid).unwrap_or(0)),
        _ => Err(CapsuleError::Unexpected {
            id: capsule.id.clone(),
        }
        .report()),
    }
}
