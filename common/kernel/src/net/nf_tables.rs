//! The few nf_tables messages that the network lock needs (<linux/netfilter/nf_tables.h>).

use std::collections::BTreeSet;
use std::ops::Range;

use super::netlink::{Attributes, Messages, NetlinkError, NetlinkSocket};

/// `NFT_TABLE_F_OWNER` (Linux 5.12): only the creating socket may change the table, and the kernel
/// removes it when that socket is closed, however its holder ends.
const TABLE_OWNER: u32 = 0x2;
/// `NFPROTO_INET`: one table for IPv4 and IPv6.
const INET: u8 = 1;
/// `NF_INET_LOCAL_IN`: what is about to be delivered to this network namespace.
const HOOK_INPUT: u32 = 1;
/// Before connection tracking (-200) and its defragmentation (-400): nobody else counts or
/// changes a packet that is dropped here.
const PRIORITY: i32 = -450;
/// `NF_DROP` and `NF_ACCEPT`.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// `NFT_REG32_00`: the first of sixteen registers of four bytes.
const REGISTER: u32 = 8;
/// `NFT_REG_VERDICT`.
const VERDICT: u32 = 0;
/// `NFTA_LIST_ELEM`.
const LIST_ELEMENT: u16 = 1;

/// A datagram is sent once it has grown beyond this, in bytes: far below the default limit of a
/// socket's send buffer (net.core.wmem_default, 208 KiB).
const DATAGRAM: usize = 64 * 1024;
/// Set elements in one message, so that their list stays below the 64 KiB of an attribute.
const ELEMENTS: usize = 512;

/// What a chain does with a packet that no rule of it takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Policy {
    Drop,
    Accept,
}

/// Part of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    /// `NFT_PAYLOAD_NETWORK_HEADER` or `NFT_PAYLOAD_TRANSPORT_HEADER`.
    pub base: i32,
    /// Offset in that header, in bytes.
    pub offset: u32,
    /// Length in bytes.
    pub length: u32,
}

/// A set of keys: packets whose `fields`, one behind the other, are in it are dropped. Each field
/// takes whole registers: a shorter one is followed by zeros.
#[derive(Debug)]
pub(super) struct Blocked {
    /// Name of the set, unique in its table.
    pub name: &'static str,
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub family: i32,
    /// What the key is made of.
    pub fields: &'static [Field],
    /// The keys, all of the same length.
    pub keys: BTreeSet<Vec<u8>>,
}

impl Blocked {
    fn key_length(&self) -> u32 {
        self.fields
            .iter()
            .map(|field| field.length.next_multiple_of(4))
            .sum()
    }
}

/// Builds a table step by step; what was pushed is committed in as few transactions as fit.
pub(super) struct TableBuilder<'a> {
    socket: &'a NetlinkSocket,
    table: &'a str,
    batch: Messages,
    acknowledged: Range<u32>,
}

impl<'a> TableBuilder<'a> {
    pub fn new(socket: &'a NetlinkSocket, table: &'a str) -> Self {
        let mut builder = Self {
            socket,
            table,
            batch: Messages::new(),
            acknowledged: 1..1,
        };
        builder.begin();
        builder
    }

    /// The table itself, owned by the socket.
    pub fn table(&mut self) {
        let table = self.table;
        self.push(
            libc::NFT_MSG_NEWTABLE,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            |message| {
                message.text(1, table);
                message.u32_be(2, TABLE_OWNER);
            },
        );
    }

    /// Removes the table and all that is in it.
    pub fn delete(&mut self) {
        let table = self.table;
        self.push(libc::NFT_MSG_DELTABLE, 0, |message| message.text(1, table));
    }

    /// The one chain of the table, hooked before delivery to local sockets.
    pub fn input_chain(&mut self, policy: Policy) {
        let table = self.table;
        let policy = match policy {
            Policy::Drop => DROP,
            Policy::Accept => ACCEPT,
        };
        self.push(
            libc::NFT_MSG_NEWCHAIN,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            |message| {
                message.text(1, table);
                message.text(3, CHAIN);
                message.nested(4, |hook| {
                    hook.u32_be(1, HOOK_INPUT);
                    hook.u32_be(2, PRIORITY.cast_unsigned());
                });
                message.u32_be(5, policy);
                message.text(7, "filter");
            },
        );
    }

    /// The set with its elements; harmless until a rule looks into it.
    pub fn set(&mut self, id: u32, blocked: &Blocked) -> Result<(), NetlinkError> {
        let table = self.table;
        let size = u32::try_from(blocked.keys.len()).map_err(|_| NetlinkError::TooLong {
            what: "a set",
            length: blocked.keys.len(),
            limit: u32::MAX as usize,
        })?;
        self.push(
            libc::NFT_MSG_NEWSET,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            |message| {
                message.text(1, table);
                message.text(2, blocked.name);
                message.u32_be(3, 0);
                message.u32_be(4, 0);
                message.u32_be(5, blocked.key_length());
                message.nested(9, |description| description.u32_be(1, size));
                message.u32_be(10, id);
            },
        );
        let mut keys = blocked.keys.iter().peekable();
        while keys.peek().is_some() {
            self.push(libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, |message| {
                message.text(1, table);
                message.text(2, blocked.name);
                message.nested(3, |list| {
                    for key in keys.by_ref().take(ELEMENTS) {
                        list.nested(LIST_ELEMENT, |element| {
                            element.nested(1, |data| data.bytes(1, key));
                        });
                    }
                });
            });
            if self.batch.len() > DATAGRAM {
                self.commit()?;
                self.begin();
            }
        }
        Ok(())
    }

    /// The rule that drops the TCP packets whose key is in the set.
    pub fn drop_rule(&mut self, blocked: &Blocked) {
        let table = self.table;
        self.push(
            libc::NFT_MSG_NEWRULE,
            libc::NLM_F_CREATE | libc::NLM_F_APPEND,
            |message| {
                message.text(1, table);
                message.text(2, CHAIN);
                message.nested(4, |list| {
                    equals(list, libc::NFT_META_NFPROTO, blocked.family as u8);
                    equals(list, libc::NFT_META_L4PROTO, libc::IPPROTO_TCP as u8);
                    let mut register = REGISTER;
                    for field in blocked.fields {
                        expression(list, "payload", |data| {
                            data.u32_be(1, register);
                            data.u32_be(2, field.base.cast_unsigned());
                            data.u32_be(3, field.offset);
                            data.u32_be(4, field.length);
                        });
                        register += field.length.div_ceil(4);
                    }
                    expression(list, "lookup", |data| {
                        data.text(1, blocked.name);
                        data.u32_be(2, REGISTER);
                    });
                    expression(list, "immediate", |data| {
                        data.u32_be(1, VERDICT);
                        data.nested(2, |value| {
                            value.nested(2, |verdict| verdict.u32_be(1, DROP))
                        });
                    });
                });
            },
        );
    }

    /// Commits what was pushed since the last commit: all of it or nothing.
    pub fn commit(&mut self) -> Result<(), NetlinkError> {
        self.control(libc::NFNL_MSG_BATCH_END);
        let datagram = self.batch.finish()?;
        self.socket
            .transact("nf_tables transaction", datagram, self.acknowledged.clone())
    }

    fn begin(&mut self) {
        self.batch = Messages::new();
        self.acknowledged.start = self.acknowledged.end;
        self.control(libc::NFNL_MSG_BATCH_BEGIN);
    }

    /// Begin and end of a transaction; not acknowledged, sequence number 0.
    fn control(&mut self, kind: i32) {
        // struct nfgenmsg: family, version, subsystem in network byte order.
        let header = [
            libc::AF_UNSPEC as u8,
            0,
            0,
            libc::NFNL_SUBSYS_NFTABLES as u8,
        ];
        self.batch
            .push(kind as u16, libc::NLM_F_REQUEST as u16, 0, &header, |_| {});
    }

    fn push(&mut self, kind: i32, flags: i32, fill: impl FnOnce(&mut Attributes<'_>)) {
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        self.batch
            .push(kind, flags, self.acknowledged.end, &[INET, 0, 0, 0], fill);
        self.acknowledged.end += 1;
    }
}

const CHAIN: &str = "input";

fn expression(list: &mut Attributes<'_>, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
    list.nested(LIST_ELEMENT, |element| {
        element.text(1, name);
        element.nested(2, fill);
    });
}

/// Goes on only if a one-byte property of the packet has this value.
fn equals(list: &mut Attributes<'_>, key: i32, value: u8) {
    expression(list, "meta", |data| {
        data.u32_be(1, REGISTER);
        data.u32_be(2, key.cast_unsigned());
    });
    expression(list, "cmp", |data| {
        data.u32_be(1, REGISTER);
        data.u32_be(2, 0);
        data.nested(3, |compared| compared.bytes(1, &[value]));
    });
}
