//! A member's virtual network: a macvlan interface (bridge mode) on the node's uplink, made inside
//! the capsule's network namespace and named eth0, with the address that moves with the member.
//!
//! After a move the interface has another hardware address. `arp_notify` makes the kernel announce
//! it when the interface comes up (`ip-sysctl.rst`), so that neighbours forget the old one.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::member::Placement;
use crcoord_kernel::namespace::{Namespace, NamespaceError, NamespaceKind, in_network_namespace};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::MacVlanMode;
use rtnetlink::{Handle, LinkMacVlan, LinkUnspec};

/// Name of the interface inside the capsule.
/// Name of a capsule's interface inside it.
pub const INTERFACE: &str = "eth0";

/// Why a member's network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no such interface.
    #[error("uplink {uplink} does not exist on this node")]
    NoUplink {
        /// Its name.
        uplink: String,
    },
    /// No uplink is configured, and none has the address from which the coordinator is reached.
    #[error("no interface of this node has the address {address}")]
    NoInterface {
        /// The address.
        address: IpAddr,
    },
    /// The kernel refused.
    #[error("{step}: {reason}")]
    Netlink {
        /// What was tried.
        step: String,
        /// The kernel's words.
        reason: String,
        /// Its errno.
        errno: Option<i32>,
    },
    /// The capsule's namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A socket, thread or file.
    #[error("{step}: {source}")]
    Io {
        /// What was tried.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl NetworkError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            NetworkError::NoUplink { .. } | NetworkError::NoInterface { .. } => {
                Report::new("agent-network-uplink", Class::Obstacle, text)
                    .remedy("set network.uplink to the interface that joins the nodes")
            }
            NetworkError::Netlink { errno, .. } => {
                Report::new("agent-network", Class::Failure, text)
                    .errno(*errno)
                    .remedy("check that the uplink is up and that the kernel has macvlan")
            }
            NetworkError::Namespace(_) => Report::new("agent-network", Class::Failure, text),
            NetworkError::Io { source, .. } => {
                Report::new("agent-network", Class::Failure, text).errno(source.raw_os_error())
            }
        }
    }
}

/// Gives the capsule with this PID 1 an interface. Blocks; call off the runtime.
///
/// # Errors
/// [`NetworkError`]; the interface, if made, goes with the capsule.
pub fn connect(uplink: &str, init: i32, address: IpAddr, prefix: u8) -> Result<(), NetworkError> {
    let namespace = Namespace::of_process(init, NamespaceKind::Network)?;
    on_own_runtime(|handle| async move {
        let parent = index_of(&handle, uplink)
            .await?
            .ok_or_else(|| NetworkError::NoUplink {
                uplink: uplink.to_owned(),
            })?;
        // Made in the capsule's namespace at once: it never has a name on the node.
        let message = LinkMacVlan::new(INTERFACE, parent, MacVlanMode::Bridge)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let made = handle.link().add(message).execute().await;
        made.map_err(refused(format!("making a macvlan interface on {uplink}")))?;
        Ok(namespace)
    })
    .and_then(|namespace| {
        in_network_namespace(namespace.as_fd(), || {
            on_own_runtime(|handle| async move { bring_up(&handle, address, prefix).await })
        })?
    })
}

/// Tries to make and remove a macvlan on the uplink in a namespace made for it.
///
/// # Errors
/// Why members with a virtual network cannot run here.
pub fn probe(uplink: &str) -> Result<(), NetworkError> {
    let namespace = Namespace::fresh_network()?;
    on_own_runtime(|handle| async move {
        let parent = index_of(&handle, uplink)
            .await?
            .ok_or_else(|| NetworkError::NoUplink {
                uplink: uplink.to_owned(),
            })?;
        let message = LinkMacVlan::new(INTERFACE, parent, MacVlanMode::Bridge)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let made = handle.link().add(message).execute().await;
        made.map_err(refused(format!("making a macvlan interface on {uplink}")))
        // The namespace ends here and the interface with it.
    })
}

/// The interface that has this address.
///
/// # Errors
/// [`NetworkError::NoInterface`] and what netlink says.
pub fn interface_with(address: IpAddr) -> Result<String, NetworkError> {
    on_own_runtime(|handle| async move {
        let addresses = handle
            .address()
            .get()
            .execute()
            .try_collect::<Vec<_>>()
            .await;
        let addresses = addresses.map_err(refused("listing addresses".into()))?;
        let index = addresses.iter().find_map(|message| {
            let has = message.attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(one) | AddressAttribute::Address(one) => *one == address,
                _ => false,
            });
            has.then_some(message.header.index)
        });
        let index = index.ok_or(NetworkError::NoInterface { address })?;
        let mut links = handle.link().get().match_index(index).execute();
        let link = links
            .try_next()
            .await
            .map_err(refused("reading a link".into()))?;
        link.and_then(|link| {
            link.attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    rtnetlink::packet_route::link::LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                })
        })
        .ok_or(NetworkError::NoInterface { address })
    })
}

/// The content of /etc/hosts inside a capsule: the node's own entries, then the members' names.
pub fn hosts(node: &str, hostname: &str, placements: &[Placement]) -> String {
    let mut text = node.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str("# members of the job, written by crcoord\n");
    for placement in placements {
        let own = match placement.node.as_str() == hostname {
            true => format!(" {hostname}"),
            false => String::new(),
        };
        text.push_str(&format!(
            "{} crcoord-member-{}{own}\n",
            placement.address, placement.member
        ));
    }
    text
}

async fn bring_up(handle: &Handle, address: IpAddr, prefix: u8) -> Result<(), NetworkError> {
    let index = index_of(handle, INTERFACE)
        .await?
        .ok_or_else(|| NetworkError::NoUplink {
            uplink: INTERFACE.to_owned(),
        })?;
    let added = handle.address().add(index, address, prefix).execute().await;
    added.map_err(refused(format!(
        "giving {INTERFACE} the address {address}/{prefix}"
    )))?;
    // /proc/sys/net shows the network namespace of the thread that opens it.
    let notify = match address {
        IpAddr::V4(_) => format!("/proc/sys/net/ipv4/conf/{INTERFACE}/arp_notify"),
        IpAddr::V6(_) => format!("/proc/sys/net/ipv6/conf/{INTERFACE}/ndisc_notify"),
    };
    fs::write(&notify, "1").map_err(|source| NetworkError::Io {
        step: format!("setting {notify}"),
        source,
    })?;
    let up = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(up).execute().await;
    set.map_err(refused(format!("bringing {INTERFACE} up")))
}

async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>, NetworkError> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(message))
            if message.raw_code() == -rustix::io::Errno::NODEV.raw_os_error() =>
        {
            Ok(None)
        }
        Err(error) => Err(refused(format!("looking for interface {name}"))(error)),
    }
}

/// Runs netlink work in the calling thread's network namespace, whatever the daemon's runtime is in.
fn on_own_runtime<T, F>(work: impl FnOnce(Handle) -> F) -> Result<T, NetworkError>
where
    F: Future<Output = Result<T, NetworkError>>,
{
    let io = |step: &str| {
        let step = step.to_owned();
        move |source| NetworkError::Io { step, source }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(io("starting a runtime for netlink"))?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(io("opening a netlink socket"))?;
        tokio::spawn(connection);
        work(handle).await
    })
}

fn refused(step: String) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| NetworkError::Netlink {
        step,
        errno: match &error {
            rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
            _ => None,
        },
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crcoord_kernel::namespace::{loopback_up, unshare};
    use rtnetlink::LinkVeth;
    use std::net::UdpSocket;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    /// A process that only keeps its network namespace.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let mut child = Command::new("unshare")
                .args(["--net", "sh", "-c", "echo ready; exec sleep 600"])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let out = child.stdout.as_mut().unwrap();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
            assert_eq!(line, "ready\n", "unshare needs CAP_SYS_ADMIN");
            Sleeper(child)
        }

        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }

        fn bind(&self, address: &str) -> UdpSocket {
            let namespace = Namespace::of_process(self.pid(), NamespaceKind::Network).unwrap();
            let bound = in_network_namespace(namespace.as_fd(), || UdpSocket::bind(address));
            let socket = bound.unwrap().unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            socket
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn in_fresh_network<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(&[NamespaceKind::Network]).expect("the test needs CAP_SYS_ADMIN");
                loopback_up().unwrap();
                on_own_runtime(|handle| async move {
                    handle
                        .link()
                        .add(LinkVeth::new("up0", "up1").build())
                        .execute()
                        .await
                        .unwrap();
                    for name in ["up0", "up1"] {
                        let index = index_of(&handle, name).await?.unwrap();
                        let up = LinkUnspec::new_with_index(index).up();
                        handle.link().set(up.build()).execute().await.unwrap();
                    }
                    Ok(())
                })
                .unwrap();
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    #[test]
    fn two_members_talk_and_a_moved_address_is_found_again() {
        in_fresh_network(|| {
            let (one, two, three) = (Sleeper::start(), Sleeper::start(), Sleeper::start());
            let address = |last| IpAddr::from([10, 224, 0, last]);
            // Members on both ends of the cable, as on two nodes.
            connect("up0", one.pid(), address(1), 24).unwrap();
            connect("up1", two.pid(), address(2), 24).unwrap();
            let (first, second) = (one.bind("10.224.0.1:7000"), two.bind("10.224.0.2:7000"));
            let mut bytes = [0; 8];
            first.send_to(b"hello", "10.224.0.2:7000").unwrap();
            assert_eq!(second.recv(&mut bytes).unwrap(), 5);

            // The member moves to the other node: the peer's neighbour entry must follow.
            drop((second, two));
            connect("up0", three.pid(), address(2), 24).unwrap();
            let moved = three.bind("10.224.0.2:7000");
            first.send_to(b"again!", "10.224.0.2:7000").unwrap();
            assert_eq!(moved.recv(&mut bytes).unwrap(), 6);
        });
    }

    #[test]
    fn a_missing_uplink_is_named_and_a_probe_leaves_nothing() {
        in_fresh_network(|| {
            let sleeper = Sleeper::start();
            let address = IpAddr::from([10, 224, 0, 1]);
            let error = connect("nowhere", sleeper.pid(), address, 24).unwrap_err();
            assert!(
                matches!(&error, NetworkError::NoUplink { uplink } if uplink == "nowhere"),
                "{error}"
            );
            probe("up0").unwrap();
            let links = on_own_runtime(|handle| async move {
                Ok(handle
                    .link()
                    .get()
                    .execute()
                    .try_collect::<Vec<_>>()
                    .await
                    .unwrap()
                    .len())
            });
            assert_eq!(links.unwrap(), 3);
            assert_eq!(interface_with(IpAddr::from([127, 0, 0, 1])).unwrap(), "lo");
        });
    }

    #[test]
    fn hosts_keeps_the_nodes_entries_and_names_the_members() {
        let placement = |member, node: &str, last| Placement {
            member: crcoord_common::ids::MemberId(member),
            node: node.parse().unwrap(),
            address: IpAddr::from([10, 0, 0, last]),
        };
        let text = hosts(
            "127.0.0.1 localhost",
            "n1",
            &[placement(0, "n1", 1), placement(1, "n2", 2)],
        );
        assert_eq!(
            text,
            "127.0.0.1 localhost\n# members of the job, written by crcoord\n\
             10.0.0.1 crcoord-member-0 n1\n10.0.0.2 crcoord-member-1\n"
        );
    }
}
