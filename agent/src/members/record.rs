//! What an agent writes down about a member, so that the next agent of this node finds it again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crcoord_common::ids::MemberKey;
use crcoord_common::image::ChunkId;
use crcoord_common::wire::member::{CapsuleSpec, ExitStatus, Owner};
use serde::{Deserialize, Serialize};

/// A member's state file. It lies in the run directory, which a reboot empties, as it ends members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The member.
    pub key: MemberKey,
    /// What it is.
    pub kind: Kind,
    /// Credentials of its processes.
    pub owner: Owner,
    /// How it ended.
    pub ended: Option<ExitStatus>,
}

/// What a member is on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A capsule.
    Capsule {
        /// What it was made with.
        spec: Box<CapsuleSpec>,
        /// Its cgroup.
        cgroup: Option<PathBuf>,
        /// The file over its /etc/hosts.
        hosts: Option<PathBuf>,
    },
    /// A tree that ran before crcoord knew of it.
    Adopted {
        /// Its root process.
        pid: i32,
        /// That process's start in clock ticks since boot: with the pid it names one process.
        start: u64,
    },
}

/// A short name of a member, unique on a node, safe as one path component and in a socket's path.
pub fn short_name(key: &MemberKey) -> String {
    let hash = ChunkId::of(key.to_string().as_bytes()).to_string();
    let job: String = key.job.id.as_str().chars().take(20).collect();
    format!("{job}-{}-{}-{}", key.incarnation, key.member, &hash[..8])
}

impl Record {
    /// Where it lies below the run directory.
    pub fn path(run_dir: &Path, key: &MemberKey) -> PathBuf {
        run_dir
            .join("members")
            .join(format!("{}.json", short_name(key)))
    }

    /// Writes it so that after a crash either the old or the new one is there.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        let path = Self::path(run_dir, &self.key);
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        write_durably(&path, &text)
    }

    /// All records; unreadable ones are told and left alone.
    ///
    /// # Errors
    /// What the kernel said about the directory.
    pub fn read_all(run_dir: &Path) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(run_dir.join("members"))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let record = fs::read(&path)
                .and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other));
            match record {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a member's state is unreadable");
                }
            }
        }
        Ok(records)
    }

    /// Removes it; one that is gone already is no error.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn remove(run_dir: &Path, key: &MemberKey) -> io::Result<()> {
        match fs::remove_file(Self::path(run_dir, key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Replaces a small file as a whole.
///
/// # Errors
/// What the kernel said.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crcoord_common::ids::{Incarnation, JobKey, MemberId};

    #[test]
    fn records_are_found_again_and_names_stay_short() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("members")).unwrap();
        let job = JobKey {
            cluster: "c".parse().unwrap(),
            id: "4".repeat(64).parse().unwrap(),
            submitted: 9,
        };
        let key = MemberKey {
            job,
            incarnation: Incarnation(1),
            member: MemberId(2),
        };
        let mut other = key.clone();
        other.job.submitted = 10;
        assert_ne!(short_name(&key), short_name(&other));
        assert!(short_name(&key).len() < 52, "{}", short_name(&key));
        let record = Record {
            key: key.clone(),
            kind: Kind::Adopted { pid: 7, start: 8 },
            owner: Owner {
                uid: 1,
                gid: 2,
                groups: vec![3],
            },
            ended: Some(ExitStatus::Lost),
        };
        record.write(directory.path()).unwrap();
        fs::write(directory.path().join("members/broken.json"), "{").unwrap();
        assert_eq!(Record::read_all(directory.path()).unwrap(), [record]);
        Record::remove(directory.path(), &key).unwrap();
        Record::remove(directory.path(), &key).unwrap();
        assert_eq!(Record::read_all(directory.path()).unwrap(), []);
    }
}
