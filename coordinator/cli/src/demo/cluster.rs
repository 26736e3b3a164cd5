//! `Cluster`: a head with the coordinator and several nodes with agents on one machine, each in
//! namespaces of its own (network, PID, mount, UTS, IPC), joined by cables and a bridge.
//!
//! ```text
//!   head (bridge0 10.98.0.1, coordinator)
//!     |port1      |port2      |port3
//!   n1 eth0     n2 eth0     n3 eth0        10.98.0.2, .3, .4; a PID 1, an agent
//! ```
//! Needs CAP_SYS_ADMIN (root, or inside a user namespace). Nothing outlives the owner: every PID 1
//! holds the read end of a pipe and ends with the other end, and namespaces end with their
//! processes; no file of the system is touched besides the cluster's own directory.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use crcoord_common::ids::NodeName;
use crcoord_transport::Role;
use crcoord_transport::pki;

use super::cabling;
use super::error::DemoError;
use super::node::Node;

/// Name of the cluster in its certificates.
const NAME: &str = "demo";
/// Most nodes, for the last byte of their addresses.
const NODES_LIMIT: usize = 250;

/// What a cluster is built of.
#[derive(Clone, Debug)]
pub struct Options {
    /// The binary `crcoord`.
    pub program: PathBuf,
    /// An empty directory that all nodes see; it holds configuration, certificates, the
    /// coordinator's journal and socket, and logs. A short path: it is part of socket names.
    pub directory: PathBuf,
    /// Names of the nodes that get an agent.
    pub nodes: Vec<NodeName>,
    /// Further lines of the configuration, such as `coordinator.hold_lease = "3s"`.
    pub settings: Vec<String>,
    /// What the daemons log.
    pub log: String,
}

/// A running cluster. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    head: Node,
    nodes: BTreeMap<NodeName, Node>,
}

impl Cluster {
    /// Builds namespaces, network, certificates and configuration; starts no daemon yet.
    ///
    /// # Errors
    /// [`DemoError`]; what was built is gone then.
    pub fn build(options: Options) -> Result<Self, DemoError> {
        if options.nodes.len() > NODES_LIMIT {
            return Err(DemoError::Network {
                step: "numbering the nodes".to_owned(),
                reason: format!("at most {NODES_LIMIT} have room in the network"),
            });
        }
        for name in ["private", "logs", "state"] {
            let path = options.directory.join(name);
            std::fs::create_dir_all(&path)
                .map_err(DemoError::io(format!("making {}", path.display())))?;
        }
        make_certificates(&options)?;
        write_configuration(&options)?;
        let private = options.directory.join("private");
        let head = Node::start(&options.program, &head_name(), &private)?;
        cabling::make_bridge(head.init(), address(0))?;
        let mut cluster = Cluster {
            head,
            nodes: BTreeMap::new(),
            options,
        };
        for (index, name) in cluster.options.nodes.iter().enumerate() {
            let node = Node::start(&cluster.options.program, name, &private)?;
            let port = port_of(index);
            cabling::plug_in(cluster.head.init(), &port, node.init(), address(index + 1))?;
            cluster.nodes.insert(name.clone(), node);
        }
        Ok(cluster)
    }

    /// Starts the coordinator at the head.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn start_coordinator(&mut self) -> Result<(), DemoError> {
        let log = self.log(&head_name(), "coordinator");
        self.head
            .run("coordinator", self.daemon("coordinator"), log)
    }

    /// Starts the agent of a node.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn start_agent(&mut self, node: &NodeName) -> Result<(), DemoError> {
        let (log, arguments) = (self.log(node, "agent"), self.daemon("agent"));
        self.node(node)?.run("agent", arguments, log)
    }

    /// Starts all daemons.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn start_all(&mut self) -> Result<(), DemoError> {
        self.start_coordinator()?;
        for node in self.options.nodes.clone() {
            self.start_agent(&node)?;
        }
        Ok(())
    }

    /// An error, with the end of its log, if a daemon that should run has ended.
    ///
    /// # Errors
    /// [`DemoError::Daemon`].
    pub fn check(&mut self) -> Result<(), DemoError> {
        self.head.check()?;
        self.nodes.values_mut().try_for_each(Node::check)
    }

    /// Kills the coordinator's process alone (SIGKILL).
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn kill_coordinator(&mut self) -> Result<(), DemoError> {
        self.head.kill_program("coordinator")
    }

    /// Kills a node's agent alone (SIGKILL); its members live on.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn kill_agent(&mut self, node: &NodeName) -> Result<(), DemoError> {
        self.node(node)?.kill_program("agent")
    }

    /// Pulls a node's cable for ever; what runs on the node runs on, cut off.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn cut_cable(&mut self, node: &NodeName) -> Result<(), DemoError> {
        let index = self.options.nodes.iter().position(|name| name == node);
        let index = index.ok_or_else(|| unknown(node))?;
        cabling::cut(self.head.init(), &port_of(index))
    }

    /// Ends a node outright: first its cable, so that no last packet leaves it, then every process.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn lose_node(&mut self, node: &NodeName) -> Result<(), DemoError> {
        self.cut_cable(node)?;
        self.nodes.remove(node).ok_or_else(|| unknown(node))?.kill()
    }

    /// PID 1 of a node, as the owner sees it: an entrance to its namespaces.
    pub fn init_of(&self, node: &NodeName) -> Option<i32> {
        self.nodes.get(node).map(Node::init)
    }

    /// The process of a daemon (`agent`, `coordinator`) as the owner sees it, while it runs.
    pub fn process_of(&self, node: &NodeName, daemon: &str) -> Option<i32> {
        match *node == head_name() {
            true => self.head.process_of(daemon),
            false => self.nodes.get(node)?.process_of(daemon),
        }
    }

    /// The coordinator's socket, for commands outside of the cluster.
    pub fn socket(&self) -> PathBuf {
        self.options.directory.join("coordinator.sock")
    }

    /// The configuration file of all nodes.
    pub fn configuration(&self) -> PathBuf {
        configuration_of(&self.options.directory)
    }

    /// The log of a daemon (`agent` or `coordinator`).
    pub fn log(&self, node: &NodeName, daemon: &str) -> PathBuf {
        self.options
            .directory
            .join(format!("logs/{node}-{daemon}.log"))
    }

    /// The directory of all logs.
    pub fn logs(&self) -> PathBuf {
        self.options.directory.join("logs")
    }

    fn daemon(&self, role: &str) -> Vec<String> {
        let file = self.configuration().display().to_string();
        ["--config", &file, "--log", &self.options.log, role]
            .map(str::to_owned)
            .to_vec()
    }

    fn node(&mut self, node: &NodeName) -> Result<&mut Node, DemoError> {
        self.nodes.get_mut(node).ok_or_else(|| unknown(node))
    }
}

/// The name of the node on which the coordinator runs.
pub fn head_name() -> NodeName {
    "head".parse().expect("the constant is a valid name")
}

fn unknown(node: &NodeName) -> DemoError {
    DemoError::Node {
        node: node.clone(),
        reason: "the cluster has no such node".to_owned(),
    }
}

fn port_of(index: usize) -> String {
    format!("port{}", index + 1)
}

/// The head is 0, nodes count from 1; at most [`NODES_LIMIT`].
fn address(index: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 98, 0, 1 + index as u8))
}

fn configuration_of(directory: &Path) -> PathBuf {
    directory.join("crcoord.toml")
}

fn make_certificates(options: &Options) -> Result<(), DemoError> {
    let directory = options.directory.join("pki");
    pki::init(&directory, NAME)?;
    let nodes = options.nodes.iter().map(|node| (Role::Node, node.as_str()));
    for (role, name) in nodes.chain([(Role::Coordinator, "coordinator")]) {
        let request = pki::Request {
            role,
            name,
            subject_names: &[],
            validity: pki::DEFAULT_VALIDITY,
        };
        pki::issue(&directory, &request, &directory)?;
    }
    Ok(())
}

/// One file for all nodes; what is a node's own lies in its private memory filesystem.
fn write_configuration(options: &Options) -> Result<(), DemoError> {
    let directory = options.directory.display();
    let mut text = format!(
        "cluster.name = \"{NAME}\"\n\
         cluster.pki_dir = \"{directory}/pki\"\n\
         coordinator.address = \"{head}:7117\"\n\
         coordinator.socket = \"{directory}/coordinator.sock\"\n\
         coordinator.state_dir = \"{directory}/state\"\n\
         agent.run_dir = \"{directory}/private/run\"\n\
         agent.store_dir = \"{directory}/private/store\"\n\
         agent.min_free = \"1M\"\n\
         network.uplink = \"{uplink}\"\n",
        head = address(0),
        uplink = cabling::UPLINK,
    );
    for setting in &options.settings {
        text.push_str(setting);
        text.push('\n');
    }
    let path = configuration_of(&options.directory);
    std::fs::write(&path, text).map_err(DemoError::io(format!("writing {}", path.display())))
}
