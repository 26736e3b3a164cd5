//! A cgroup per capsule, below the agent's own: optional, degrades to none with a note.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where capsules' cgroups are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    base: PathBuf,
}

impl Cgroups {
    /// The unified hierarchy, else the v1 freezer, at the agent's own place in it (`cgroups(7)`).
    ///
    /// # Errors
    /// Why there is none that this process may use.
    pub fn find() -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let place = place(&mounts, &own).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "no cgroup2 and no v1 freezer mount",
            )
        })?;
        let base = place.join("crcoord");
        match fs::create_dir(&base) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        Ok(Cgroups { base })
    }

    /// Makes the cgroup of one capsule; an empty one that was left over is used again.
    ///
    /// # Errors
    /// What the kernel said; `ResourceBusy` where processes are in it.
    pub fn create(&self, id: &str) -> io::Result<PathBuf> {
        let path = self.base.join(id);
        match fs::create_dir(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match fs::read_to_string(path.join("cgroup.procs"))?.is_empty() {
                    true => Ok(path),
                    false => Err(io::ErrorKind::ResourceBusy.into()),
                }
            }
            Err(error) => Err(error),
        }
    }
}

/// Removes a capsule's cgroup once it is empty.
///
/// # Errors
/// EBUSY while a process is in it; one that is gone already is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The directory of the agent's own cgroup, from /proc/self/mountinfo (`proc_pid_mountinfo(5)`) and
/// /proc/self/cgroup.
fn place(mounts: &str, own: &str) -> Option<PathBuf> {
    let mount = |kind: &str, option: Option<&str>| {
        mounts.lines().find_map(|line| {
            let (front, back) = line.split_once(" - ")?;
            let mut back = back.split(' ');
            let fits = back.next() == Some(kind)
                && option.is_none_or(|option| {
                    back.nth(1)
                        .is_some_and(|all| all.split(',').any(|one| one == option))
                });
            let mut front = front.split(' ').skip(3);
            let (root, point) = (front.next()?, front.next()?);
            // A mount of a part of the hierarchy (a container's) shows that part only.
            fits.then(|| (root.to_owned(), PathBuf::from(point)))
        })
    };
    let path = |wanted: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, names, path) = (fields.next()?, fields.next()?, fields.next()?);
            let fits = match wanted {
                "" => number == "0" && names.is_empty(),
                name => names.split(',').any(|one| one == name),
            };
            fits.then_some(path)
        })
    };
    let below = |(root, point): (String, PathBuf), path: &str| {
        let inside = match root.as_str() {
            "/" => path,
            root => path.strip_prefix(root)?,
        };
        Some(point.join(inside.trim_start_matches('/')))
    };
    mount("cgroup2", None)
        .zip(path(""))
        .and_then(|(mount, path)| below(mount, path))
        .or_else(|| {
            let (mount, path) = mount("cgroup", Some("freezer")).zip(path("freezer"))?;
            below(mount, path)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime shared:9 - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_unified_hierarchy_comes_first() {
        let own = "6:freezer:/jobs\n0::/system.slice/crcoord.service\n";
        assert_eq!(
            place(HYBRID, own).unwrap(),
            Path::new("/sys/fs/cgroup/unified/system.slice/crcoord.service")
        );
        let without: String = HYBRID
            .lines()
            .filter(|line| !line.contains("cgroup2"))
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(
            place(&without, own).unwrap(),
            Path::new("/sys/fs/cgroup/freezer/jobs")
        );
        assert_eq!(place("", own), None);
    }

    #[test]
    fn a_containers_mount_shows_its_part_only() {
        let mounts = "41 31 0:38 /box /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            place(mounts, "0::/box/a\n").unwrap(),
            Path::new("/sys/fs/cgroup/a")
        );
        assert_eq!(place(mounts, "0::/other\n"), None);
    }
}
