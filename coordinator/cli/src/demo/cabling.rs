//! The cluster's network: a bridge in the head's namespace and one cable (veth pair) to every node.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use crcoord_kernel::namespace::{Namespace, NamespaceKind, in_network_namespace, loopback_up};
use futures::TryStreamExt;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth};

use super::error::DemoError;

/// The bridge's name in the head's namespace.
const BRIDGE: &str = "bridge0";
/// The interface's name on every other node.
pub const UPLINK: &str = "eth0";
/// The bridge's hardware address. Without one of its own it takes the lowest of its ports (Linux
/// 6.18), and a node's end could change it under all others, who would talk to nobody until they ask anew.
const BRIDGE_HARDWARE: [u8; 6] = [0x02, b'c', b'r', b'c', b'o', 1];
/// Length of the network's prefix.
const PREFIX: u8 = 24;

/// Makes the bridge with the head's address.
pub fn make_bridge(head: i32, address: IpAddr) -> Result<(), DemoError> {
    inside(head, |handle| async move {
        let made = handle
            .link()
            .add(
                LinkBridge::new(BRIDGE)
                    .address(BRIDGE_HARDWARE.to_vec())
                    .build(),
            )
            .execute()
            .await;
        made.map_err(refused("making a bridge"))?;
        bring_up(&handle, BRIDGE, Some(address)).await
    })
}

/// Joins a node to the bridge by a cable whose end at the head has the name `port`.
pub fn plug_in(head: i32, port: &str, node: i32, address: IpAddr) -> Result<(), DemoError> {
    let namespace = Namespace::of_process(node, NamespaceKind::Network)?;
    let far = format!("{port}-far");
    inside(head, |handle| async move {
        let pair = LinkVeth::new(port, &far).build();
        let made = handle.link().add(pair).execute().await;
        made.map_err(refused(&format!("making the cable {port}")))?;
        let far_index = index_of(&handle, &far).await?;
        let moved = LinkUnspec::new_with_index(far_index)
            .name(UPLINK)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let moved = handle.link().set(moved).execute().await;
        moved.map_err(refused(&format!("moving the cable {port} to its node")))?;
        let joined = LinkUnspec::new_with_index(index_of(&handle, port).await?)
            .controller(index_of(&handle, BRIDGE).await?)
            .build();
        let joined = handle.link().set(joined).execute().await;
        joined.map_err(refused(&format!("joining the cable {port} to the bridge")))?;
        bring_up(&handle, port, None).await
    })?;
    inside(node, |handle| async move {
        bring_up(&handle, UPLINK, Some(address)).await
    })
}

/// Takes a cable away, with both ends.
pub fn cut(head: i32, port: &str) -> Result<(), DemoError> {
    inside(head, |handle| async move {
        let removed = handle
            .link()
            .del(index_of(&handle, port).await?)
            .execute()
            .await;
        removed.map_err(refused(&format!("cutting the cable {port}")))
    })
}

async fn bring_up(handle: &Handle, name: &str, address: Option<IpAddr>) -> Result<(), DemoError> {
    let index = index_of(handle, name).await?;
    if let Some(address) = address {
        let added = handle.address().add(index, address, PREFIX).execute().await;
        added.map_err(refused(&format!("giving {name} the address {address}")))?;
    }
    let up = handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await;
    up.map_err(refused(&format!("bringing {name} up")))
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, DemoError> {
    let mut links = handle.link().get().match_name(name).execute();
    let link = links
        .try_next()
        .await
        .map_err(refused(&format!("looking for {name}")))?;
    link.map(|link| link.header.index)
        .ok_or_else(|| DemoError::Network {
            step: format!("looking for {name}"),
            reason: "there is no such interface".to_owned(),
        })
}

/// Runs netlink work in the network namespace of a process, with its loopback up.
fn inside<F>(process: i32, work: impl FnOnce(Handle) -> F + Send) -> Result<(), DemoError>
where
    F: Future<Output = Result<(), DemoError>>,
{
    let namespace = Namespace::of_process(process, NamespaceKind::Network)?;
    in_network_namespace(namespace.as_fd(), || {
        loopback_up()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(DemoError::io("starting a runtime for netlink"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(DemoError::io("opening a netlink socket"))?;
            tokio::spawn(connection);
            work(handle).await
        })
    })?
}

fn refused(step: &str) -> impl FnOnce(rtnetlink::Error) -> DemoError {
    let step = step.to_owned();
    move |error| DemoError::Network {
        step,
        reason: error.to_string(),
    }
}
