//! What /proc/PID/fdinfo tells of a descriptor.

use std::fs;
use std::io;

use super::malformed;

/// One watched descriptor of an epoll instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpollTarget {
    /// The descriptor's number where it was added.
    pub fd: i32,
    /// Event mask.
    pub events: u32,
    /// The program's data.
    pub data: u64,
    /// Inode of the watched file.
    pub inode: u64,
    /// Device of the watched file, as the kernel encodes it internally.
    pub device: u64,
}

/// The parsed lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// File position.
    pub position: i64,
    /// Open flags, `O_CLOEXEC` for the descriptor's own flag.
    pub flags: u32,
    /// File locks on it, as printed.
    pub locks: Vec<String>,
    /// Counter of an eventfd.
    pub eventfd_count: Option<u64>,
    /// Semaphore mode of an eventfd (printed since Linux 6.6).
    pub eventfd_semaphore: bool,
    /// Watched descriptors of an epoll instance.
    pub epoll: Vec<EpollTarget>,
    /// Signals of a signalfd.
    pub signals: Option<u64>,
    /// Everything, for kinds that parse it themselves.
    pub text: String,
}

/// Reads it.
pub fn fdinfo(pid: i32, fd: i32) -> io::Result<FdInfo> {
    parse(fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?)
}

fn parse(text: String) -> io::Result<FdInfo> {
    let mut info = FdInfo::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        let bad = || malformed("fdinfo", line);
        match key.trim() {
            "pos" => info.position = value.parse().map_err(|_| bad())?,
            "flags" => info.flags = u32::from_str_radix(value, 8).map_err(|_| bad())?,
            "lock" => info.locks.push(value.to_owned()),
            "eventfd-count" => {
                info.eventfd_count = Some(u64::from_str_radix(value, 16).map_err(|_| bad())?);
            }
            "eventfd-semaphore" => info.eventfd_semaphore = value == "1",
            "sigmask" => info.signals = Some(u64::from_str_radix(value, 16).map_err(|_| bad())?),
            "tfd" => info.epoll.push(epoll_target(line).ok_or_else(bad)?),
            _ => {}
        }
    }
    info.text = text;
    Ok(info)
}

/// `tfd: 5 events: 19 data: 5 pos:0 ino:1c45 sdev:8`
fn epoll_target(line: &str) -> Option<EpollTarget> {
    let spaced = line.replace(':', " ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let after = |key: &str| {
        words
            .iter()
            .position(|word| *word == key)
            .and_then(|at| words.get(at + 1))
            .copied()
    };
    let hex = |key: &str| after(key).and_then(|word| u64::from_str_radix(word, 16).ok());
    Some(EpollTarget {
        fd: after("tfd")?.parse().ok()?,
        events: hex("events")? as u32,
        data: hex("data")?,
        inode: hex("ino")?,
        device: hex("sdev")?,
    })
}

/// State of a timerfd: clock, expirations not yet read, flags of `timerfd_settime`, time left and
/// interval in nanoseconds.
pub fn timerfd(info: &FdInfo) -> Option<(i32, u64, i32, u64, u64)> {
    let value = |key: &str| {
        info.text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .map(str::trim)
    };
    let time = |key: &str| {
        let (seconds, nanoseconds) = value(key)?.trim_matches(['(', ')']).split_once(',')?;
        let seconds: u64 = seconds.trim().parse().ok()?;
        Some(seconds * 1_000_000_000 + nanoseconds.trim().parse::<u64>().ok()?)
    };
    Some((
        value("clockid")?.parse().ok()?,
        value("ticks")?.parse().ok()?,
        i32::from_str_radix(value("settime flags")?, 8).ok()?,
        time("it_value")?,
        time("it_interval")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_epoll_and_timerfd() {
        let info = parse(
            "pos:\t0\nflags:\t02000002\nmnt_id:\t15\ntfd:        5 events:       19 data: \
             ffffffffffffffff  pos:0 ino:1c45 sdev:8\n"
                .into(),
        )
        .unwrap();
        assert_eq!(info.flags, 0o2000002);
        assert_eq!(
            info.epoll,
            [EpollTarget {
                fd: 5,
                events: 0x19,
                data: u64::MAX,
                inode: 0x1c45,
                device: 8
            }]
        );
        let info = parse(
            "pos:\t0\nflags:\t02\nclockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49406829)\n\
             it_interval: (1, 5)\n"
                .into(),
        )
        .unwrap();
        assert_eq!(timerfd(&info), Some((1, 3, 1, 49_406_829, 1_000_000_005)));
    }
}
