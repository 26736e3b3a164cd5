//! Mappings of a process with their flags: /proc/PID/smaps.

use std::io;

use super::malformed;

/// Flags of a mapping as /proc/PID/smaps abbreviates them (`VmFlags`), one bit each.
pub mod vm_flags {
    /// `rd`: readable.
    pub const READ: u32 = 1 << 0;
    /// `wr`: writable.
    pub const WRITE: u32 = 1 << 1;
    /// `ex`: executable.
    pub const EXECUTE: u32 = 1 << 2;
    /// `ms`: shared, also where the file was opened for reading only (then the kernel clears `sh`).
    pub const SHARED: u32 = 1 << 3;
    /// `gd`: grows down.
    pub const GROWS_DOWN: u32 = 1 << 4;
    /// `pf`: page frames without a struct page.
    pub const PFN: u32 = 1 << 5;
    /// `io`: device memory.
    pub const IO: u32 = 1 << 6;
    /// `lo`: locked.
    pub const LOCKED: u32 = 1 << 7;
    /// `dc`: not copied on fork.
    pub const DONT_FORK: u32 = 1 << 8;
    /// `wf`: wiped on fork.
    pub const WIPE_ON_FORK: u32 = 1 << 9;
    /// `dd`: not in core dumps.
    pub const DONT_DUMP: u32 = 1 << 10;
    /// `hg`: huge pages wanted.
    pub const HUGE_PAGE: u32 = 1 << 11;
    /// `nh`: huge pages unwanted.
    pub const NO_HUGE_PAGE: u32 = 1 << 12;
    /// `mg`: mergeable.
    pub const MERGEABLE: u32 = 1 << 13;
    /// `ht`: hugetlb.
    pub const HUGETLB: u32 = 1 << 14;
    /// `um`, `uw` or `ui`: a userfaultfd is registered.
    pub const USERFAULT: u32 = 1 << 15;
    /// `nr`: no swap space reserved.
    pub const NO_RESERVE: u32 = 1 << 16;
    /// `sr`: read sequentially.
    pub const SEQUENTIAL: u32 = 1 << 17;
    /// `rr`: read randomly.
    pub const RANDOM: u32 = 1 << 18;
    /// `ss`: a shadow stack.
    pub const SHADOW_STACK: u32 = 1 << 19;
    /// `sl`: sealed (mseal(2)).
    pub const SEALED: u32 = 1 << 20;
    /// `lf`: locked when faulted in.
    pub const LOCK_ON_FAULT: u32 = 1 << 21;
    /// `mw`: may become writable; for a shared file mapping, the file was opened for writing.
    pub const MAY_WRITE: u32 = 1 << 22;

    pub(super) fn parse(name: &str) -> u32 {
        match name {
            "rd" => READ,
            "wr" => WRITE,
            "ex" => EXECUTE,
            "ms" => SHARED,
            "gd" => GROWS_DOWN,
            "pf" => PFN,
            "io" => IO,
            "lo" => LOCKED,
            "dc" => DONT_FORK,
            "wf" => WIPE_ON_FORK,
            "dd" => DONT_DUMP,
            "hg" => HUGE_PAGE,
            "nh" => NO_HUGE_PAGE,
            "mg" => MERGEABLE,
            "ht" => HUGETLB,
            "um" | "uw" | "ui" => USERFAULT,
            "nr" => NO_RESERVE,
            "sr" => SEQUENTIAL,
            "rr" => RANDOM,
            "ss" => SHADOW_STACK,
            "sl" => SEALED,
            "lf" => LOCK_ON_FAULT,
            "mw" => MAY_WRITE,
            _ => 0,
        }
    }
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// [`vm_flags`].
    pub flags: u32,
    /// Memory protection key; 0 is the default.
    pub protection_key: u8,
    /// Offset in the object.
    pub offset: u64,
    /// Device of the object (`st_dev` encoding); 0 for none.
    pub device: u64,
    /// Inode of the object; 0 for none.
    pub inode: u64,
    /// Path or the kernel's name in brackets; empty for none.
    pub name: String,
    /// Resident bytes.
    pub resident: u64,
    /// Bytes in swap.
    pub swapped: u64,
}

impl Mapping {
    /// True when all these flags are set.
    pub fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// PROT_* bits.
    pub fn protection(&self) -> u32 {
        self.flags & (vm_flags::READ | vm_flags::WRITE | vm_flags::EXECUTE)
    }
}

/// All mappings of a process in ascending order.
pub fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    parse(&String::from_utf8_lossy(&std::fs::read(format!(
        "/proc/{pid}/smaps"
    ))?))
}

fn parse(text: &str) -> io::Result<Vec<Mapping>> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let key = line.split([':', ' ']).next().unwrap_or("");
        if key.contains('-') && !key.contains(|c: char| c.is_ascii_uppercase()) {
            all.push(header(line).ok_or_else(|| malformed("smaps", line))?);
            continue;
        }
        let Some(mapping) = all.last_mut() else {
            return Err(malformed("smaps", line));
        };
        let value = line[key.len()..].trim_start_matches(':').trim();
        let kilobytes = || {
            value
                .trim_end_matches(" kB")
                .parse::<u64>()
                .map(|n| n * 1024)
        };
        match key {
            "Rss" => mapping.resident = kilobytes().map_err(|_| malformed("smaps", line))?,
            "Swap" => mapping.swapped = kilobytes().map_err(|_| malformed("smaps", line))?,
            "VmFlags" => {
                mapping.flags = value
                    .split_whitespace()
                    .map(vm_flags::parse)
                    .fold(0, std::ops::BitOr::bitor);
            }
            "ProtectionKey" => {
                mapping.protection_key = value.parse().map_err(|_| malformed("smaps", line))?;
            }
            _ => {}
        }
    }
    Ok(all)
}

fn header(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = after;
        word
    };
    let (start, end) = field().split_once('-')?;
    let _permissions = field();
    let offset = u64::from_str_radix(field(), 16).ok()?;
    let (major, minor) = field().split_once(':')?;
    let device = libc::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode = field().parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        flags: 0,
        protection_key: 0,
        offset,
        device,
        inode,
        name: unescape(rest.trim_start()),
        resident: 0,
        swapped: 0,
    })
}

/// The kernel writes a newline in a path as `\012` and leaves everything else.
fn unescape(name: &str) -> String {
    name.replace("\\012", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_kernel_prints() {
        let text = "\
55d0c0a00000-55d0c0a21000 r-xp 00002000 fd:01 1234                       /usr/bin/a b (deleted)
Size:                132 kB
Rss:                  12 kB
Swap:                  4 kB
ProtectionKey:         0
VmFlags: rd ex mr mw me sd 
7ffd5e5e1000-7ffd5e602000 rw-p 00000000 00:00 0                          [stack]
Rss:                   0 kB
VmFlags: rd wr mr mw me gd ac 
";
        let all = parse(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].name, "/usr/bin/a b (deleted)");
        assert_eq!((all[0].resident, all[0].swapped), (12288, 4096));
        assert!(all[0].has(vm_flags::READ | vm_flags::EXECUTE) && !all[0].has(vm_flags::WRITE));
        assert_eq!(all[0].device, libc::makedev(0xfd, 1));
        assert!(all[1].has(vm_flags::GROWS_DOWN));
    }

    #[test]
    fn own_mappings_parse() {
        let all = mappings(std::process::id() as i32).unwrap();
        assert!(all.iter().any(|mapping| mapping.name == "[vdso]"));
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
