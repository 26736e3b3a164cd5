//! Users, groups and privileges of threads. What is restored never exceeds the job owner's.

use crcoord_common::report::Report;
use crcoord_common::wire::member::Owner;
use crcoord_kernel::number::{SYS_PRCTL, SYS_SETGROUPS, SYS_SETRESGID, SYS_SETRESUID, flag};
use crcoord_kernel::number::{SYS_SETFSGID, SYS_SETFSUID};
use crcoord_kernel::proc::{Credentials, Status};
use crcoord_kernel::stub::{Call, Stub};
use serde::{Deserialize, Serialize};

use crate::error::{Result, bad_image, obstacle};

/// Identity of one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialsImage {
    /// Real, effective, saved, filesystem uid.
    pub uids: [u32; 4],
    /// Real, effective, saved, filesystem gid.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// no_new_privs.
    pub no_new_privs: bool,
}

impl CredentialsImage {
    /// Of a thread's status.
    pub fn of(status: &Status) -> Self {
        let Credentials {
            uids, gids, groups, ..
        } = status.credentials.clone();
        CredentialsImage {
            uids,
            gids,
            groups,
            no_new_privs: status.no_new_privs,
        }
    }

    /// Refuses an identity that is not the owner's: an image is untrusted input.
    pub fn check_bounds(&self, owner: Option<&Owner>, pid: i32) -> Result<()> {
        let Some(owner) = owner else { return Ok(()) };
        if owner.uid == 0 {
            return Ok(());
        }
        let foreign_uid = self.uids.iter().find(|uid| **uid != owner.uid);
        let known = |gid: &u32| *gid == owner.gid || owner.groups.contains(gid);
        let foreign_gid = self.gids.iter().chain(&self.groups).find(|gid| !known(gid));
        if let Some(uid) = foreign_uid {
            return Err(bad_image(format!(
                "it asks for uid {uid}, the job belongs to {}",
                owner.uid
            ))
            .pid(pid)
            .into());
        }
        if let Some(gid) = foreign_gid {
            return Err(bad_image(format!(
                "it asks for group {gid}, which the job's owner lacks"
            ))
            .pid(pid)
            .into());
        }
        Ok(())
    }

    /// Takes the identity on in a stub's thread. Capabilities go with the last uid 0.
    pub fn restore(&self, stub: &Stub) -> Result<()> {
        let groups: Vec<u8> = self
            .groups
            .iter()
            .flat_map(|gid| gid.to_ne_bytes())
            .collect();
        let address = stub.put(0, &groups)?;
        let [ruid, euid, suid, fsuid] = self.uids.map(u64::from);
        let [rgid, egid, sgid, fsgid] = self.gids.map(u64::from);
        let mut calls = Vec::new();
        // Unprivileged builders (a user namespace without setgroups) already have the right ones.
        let own = Status::read(std::process::id() as i32)
            .map(|status| Self::of(&status))
            .ok();
        if own.is_none_or(|own| {
            (own.uids, own.gids, &own.groups) != (self.uids, self.gids, &self.groups)
        }) {
            calls.push(Call::new(
                SYS_SETGROUPS,
                [self.groups.len() as u64, address],
            ));
            calls.push(Call::new(SYS_SETRESGID, [rgid, egid, sgid]));
            calls.push(Call::new(SYS_SETRESUID, [ruid, euid, suid]));
        }
        if self.no_new_privs {
            calls.push(Call::new(
                SYS_PRCTL,
                [flag::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0],
            ));
        }
        stub.run_all(&calls)?;
        // These two give the former value and never an error.
        stub.run(&[
            Call::new(SYS_SETFSGID, [fsgid]),
            Call::new(SYS_SETFSUID, [fsuid]),
        ])?;
        Ok(())
    }
}

/// Reasons why a thread's privileges cannot be captured.
pub fn check(pid: i32, status: &Status) -> Vec<Report> {
    let mut reports = Vec::new();
    let credentials = &status.credentials;
    let [inheritable, permitted, effective, _, ambient] = credentials.capabilities;
    if credentials.uids.iter().all(|uid| *uid != 0)
        && inheritable | permitted | effective | ambient != 0
    {
        reports.push(
            obstacle("engine-capabilities", "has capabilities without being root")
                .pid(pid)
                .remedy("run the program without file capabilities"),
        );
    }
    if status.seccomp != 0 {
        reports.push(
            obstacle("engine-seccomp", "a seccomp filter is installed")
                .pid(pid)
                .remedy("run the program without its sandbox"),
        );
    }
    reports
}
