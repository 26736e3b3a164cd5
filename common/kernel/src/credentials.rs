//! Doing something with another user's filesystem rights.

use std::io;

struct Back {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl Drop for Back {
    fn drop(&mut self) {
        // SAFETY: integers and a live array; these raw calls change the calling thread only.
        unsafe {
            libc::syscall(libc::SYS_setfsuid, self.uid);
            libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr());
            libc::syscall(libc::SYS_setfsgid, self.gid);
        }
    }
}

/// Runs `f` with this user's filesystem identity and groups (setfsuid(2)) on the calling thread
/// only, and puts back the caller's however `f` ends. Needs CAP_SETUID and CAP_SETGID.
pub fn as_user<T>(uid: u32, gid: u32, groups: &[u32], f: impl FnOnce() -> T) -> io::Result<T> {
    let mut own = vec![0u32; 65_536];
    // SAFETY: the array is live and as long as stated.
    let count = unsafe { libc::getgroups(own.len() as i32, own.as_mut_ptr()) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    own.truncate(count as usize);
    // SAFETY: integers only; -1 changes nothing and gives the present identity.
    let (own_uid, own_gid) = unsafe {
        (
            libc::syscall(libc::SYS_setfsuid, -1) as u32,
            libc::syscall(libc::SYS_setfsgid, -1) as u32,
        )
    };
    let back = Back {
        uid: own_uid,
        gid: own_gid,
        groups: own,
    };
    // SAFETY: integers and a live array.
    let changed = unsafe {
        let groups_set = libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr());
        let error = io::Error::last_os_error();
        if groups_set < 0 && groups != back.groups.as_slice() {
            return Err(error);
        }
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
        (
            libc::syscall(libc::SYS_setfsuid, -1) as u32,
            libc::syscall(libc::SYS_setfsgid, -1) as u32,
        )
    };
    if changed != (uid, gid) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let result = f();
    drop(back);
    Ok(result)
}
