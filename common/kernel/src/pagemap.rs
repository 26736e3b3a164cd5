//! Which pages of a process hold data of its own: `PAGEMAP_SCAN` (Linux 6.7) or /proc/PID/pagemap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// What is looked for in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Anonymous memory: present or swapped pages that are not the shared zero page.
    Anonymous,
    /// A private file mapping: only pages the process has changed, whatever they hold.
    CopiedFromFile,
}

/// Open page table of a process.
#[derive(Debug)]
pub struct PageMap {
    file: File,
    page_size: u64,
    scan: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_PFNZERO: u64 = 1 << 5;

impl PageMap {
    /// Opens it; needs the right to trace the process.
    pub fn open(pid: i32) -> io::Result<PageMap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut map = PageMap {
            file,
            page_size: crate::sys::page_size(),
            scan: true,
        };
        map.scan = map
            .scan_range(0, map.page_size, Wanted::Anonymous, &mut |_, _| {})
            .is_ok();
        Ok(map)
    }

    /// True when the kernel has `PAGEMAP_SCAN`.
    pub fn has_scan(&self) -> bool {
        self.scan
    }

    /// Calls `found` with each contiguous range (start, end) of wanted pages, ascending.
    pub fn ranges(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        found: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        if self.scan {
            self.scan_range(start, end, wanted, found)
        } else {
            self.read_range(start, end, wanted, found)
        }
    }

    fn scan_range(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        found: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let mut regions = [Region::default(); 256];
        // All of `category_mask` must match after inversion, and one of `category_anyof_mask`.
        let unwanted = match wanted {
            Wanted::Anonymous => IS_PFNZERO,
            Wanted::CopiedFromFile => IS_FILE,
        };
        let mut at = start;
        while at < end {
            let mut arguments = ScanArguments {
                size: std::mem::size_of::<ScanArguments>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: unwanted,
                category_mask: unwanted,
                category_anyof_mask: IS_PRESENT | IS_SWAPPED,
                return_mask: IS_PRESENT | IS_SWAPPED,
            };
            // SAFETY: the argument and the vector it points to are live and as large as stated.
            let count =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            for region in &regions[..count as usize] {
                found(region.start, region.end);
            }
            if arguments.walk_end <= at {
                break;
            }
            at = arguments.walk_end;
        }
        Ok(())
    }

    fn read_range(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        found: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        const FILE: u64 = 1 << 61;
        const SWAPPED: u64 = 1 << 62;
        const PRESENT: u64 = 1 << 63;
        let mut entries = vec![0u8; 8 * 8192];
        let mut at = start;
        let mut open: Option<u64> = None;
        while at < end {
            let pages = ((end - at) / self.page_size).min(8192) as usize;
            let entries = &mut entries[..pages * 8];
            self.file.read_exact_at(entries, at / self.page_size * 8)?;
            for entry in entries.chunks_exact(8) {
                let mut word = [0; 8];
                word.copy_from_slice(entry);
                let word = u64::from_ne_bytes(word);
                let here = word & (PRESENT | SWAPPED) != 0
                    && (wanted == Wanted::Anonymous || word & FILE == 0);
                match (here, open) {
                    (true, None) => open = Some(at),
                    (false, Some(first)) => {
                        found(first, at);
                        open = None;
                    }
                    _ => {}
                }
                at += self.page_size;
            }
        }
        if let Some(first) = open {
            found(first, at);
        }
        Ok(())
    }
}
