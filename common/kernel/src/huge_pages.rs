//! Huge or small pages for memory of the calling process, madvise(2): the benches need both kinds.

use std::io;

use crate::sys::page_size;

/// Asks for transparent huge pages, or for small ones only, in the whole pages inside `memory`.
/// Pages that are there already stay as they are. EINVAL where the kernel has no huge pages.
pub fn advise(memory: &mut [u64], huge: bool) -> io::Result<()> {
    let page = page_size() as usize;
    let start = memory.as_ptr() as usize;
    let end = (start + size_of_val(memory)) / page * page;
    let start = start.next_multiple_of(page);
    if start >= end {
        return Ok(());
    }
    let advice = match huge {
        true => libc::MADV_HUGEPAGE,
        false => libc::MADV_NOHUGEPAGE,
    };
    // SAFETY: the range lies inside `memory`, and neither advice changes any content.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_stays() {
        let mut memory = vec![7u64; 1 << 20];
        advise(&mut memory, true).unwrap();
        advise(&mut memory, false).unwrap();
        advise(&mut memory[..1], false).unwrap();
        assert!(memory.iter().all(|word| *word == 7));
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let flags = smaps.lines().filter(|line| line.starts_with("VmFlags:"));
        assert!(flags.into_iter().any(|line| line.contains(" nh")));
    }
}
