//! Who is at the other end of the command socket, as the kernel says it.

use std::io;

use crcoord_common::wire::member::Owner;
use tokio::net::UnixStream;

/// A caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) pid: i32,
    groups: Vec<u32>,
}

impl Caller {
    /// By SO_PEERCRED (unix(7)), which the kernel filled in when the caller connected; groups by
    /// /proc/PID/status, and only if that process still has the same uid.
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let (uid, gid) = (credentials.uid(), credentials.gid());
        let pid = credentials.pid().unwrap_or(0);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        let groups = status
            .ok()
            .and_then(|status| groups_of(&status, uid))
            .unwrap_or_default();
        Ok(Caller {
            uid,
            gid,
            pid,
            groups,
        })
    }

    /// The credentials for what is done in the caller's name: of the groups that are claimed, those
    /// the caller has.
    pub(crate) fn owner(&self, claimed: &[u32]) -> Owner {
        let has =
            |group: &&u32| self.uid == 0 || **group == self.gid || self.groups.contains(group);
        Owner {
            uid: self.uid,
            gid: self.gid,
            groups: claimed.iter().filter(has).copied().collect(),
        }
    }
}

/// The supplementary groups in a /proc/PID/status (proc_pid_status(5)) of a process with that
/// effective uid.
fn groups_of(status: &str, uid: u32) -> Option<Vec<u32>> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let effective = field("Uid:")?
        .split_whitespace()
        .nth(1)?
        .parse::<u32>()
        .ok()?;
    let groups = field("Groups:")?
        .split_whitespace()
        .map(|group| group.parse().ok());
    (effective == uid)
        .then(|| groups.collect::<Option<Vec<u32>>>())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tcat\nUid:\t1000\t1000\t1000\t1000\nGroups:\t10 20 \n";

    #[test]
    fn groups_are_read_for_the_right_user_only() {
        assert_eq!(groups_of(STATUS, 1000), Some(vec![10, 20]));
        assert_eq!(groups_of(STATUS, 0), None);
        assert_eq!(groups_of("", 0), None);
    }

    #[test]
    fn a_claimed_group_that_the_caller_has_not_is_dropped() {
        let caller = Caller {
            uid: 1000,
            gid: 100,
            pid: 1,
            groups: vec![10, 20],
        };
        assert_eq!(caller.owner(&[0, 10, 100]).groups, [10, 100]);
    }
}
