//! Private anonymous memory: content, zero pages, holes, protections, fixed places, heap, huge pages.

use std::sync::atomic::Ordering;

use crcoord_zoo::memory::{Mapping, PAGE, READ_WRITE};
use crcoord_zoo::{Explain, Failure, Outcome, Stage, ensure, ensure_equal};

const HUGE: usize = 2 << 20;
const NONE: i32 = libc::PROT_NONE;
const READ: i32 = libc::PROT_READ;

pub fn run(stage: &Stage) -> Outcome {
    let mixed = Mixed::set_up()?;
    let neighbours = Neighbours::set_up()?;
    let fixed = Fixed::set_up()?;
    let heap = Heap::set_up()?;
    let huge = Huge::set_up()?;
    let code = Code::set_up()?;
    let wave = Wave::set_up()?;
    stage.ready()?;
    let mut generation = 0;
    while !stage.go_seen() {
        generation += 1;
        wave.pass(generation)?;
    }
    mixed.verify()?;
    neighbours.verify()?;
    fixed.verify()?;
    heap.verify()?;
    huge.verify()?;
    code.verify()
}

/// Pattern, written zeros and untouched pages side by side; a hole; hidden and read-only content.
struct Mixed {
    mapping: Mapping,
    permissions: Vec<Option<String>>,
}

impl Mixed {
    const PAGES: usize = 1536;
    const HOLE: usize = 700;
    const HIDDEN: usize = 900;
    const READ_ONLY: usize = 1000;
    const SPAN: usize = 10;

    fn set_up() -> Outcome<Mixed> {
        let mapping = Mapping::anonymous(Self::PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE)
            .explain("mmap of the mixed region")?;
        for page in mapping.pages() {
            match page % 3 {
                0 => mapping.fill_page(page, 1)?,
                1 => mapping
                    .write(page * PAGE, &[0; PAGE])
                    .explain("zero page")?,
                _ => {}
            }
        }
        mapping
            .unmap(Self::HOLE * PAGE, Self::SPAN * PAGE)
            .explain("munmap")?;
        mapping
            .protect(Self::HIDDEN * PAGE, Self::SPAN * PAGE, NONE)
            .explain("PROT_NONE")?;
        mapping
            .protect(Self::READ_ONLY * PAGE, Self::SPAN * PAGE, READ)
            .explain("PROT_READ")?;
        let permissions = mapping.permissions()?;
        Ok(Mixed {
            mapping,
            permissions,
        })
    }

    fn verify(&self) -> Outcome {
        let mapping = &self.mapping;
        ensure_equal!(
            mapping.permissions()?,
            self.permissions,
            "permissions of mixed memory"
        );
        let read_only = mapping.write(Self::READ_ONLY * PAGE, b"x");
        ensure!(read_only.is_err(), "a read-only page can be written");
        ensure!(
            mapping.read(Self::HIDDEN * PAGE, 1).is_err(),
            "a PROT_NONE page can be read"
        );
        ensure!(
            mapping.read(Self::HOLE * PAGE, 1).is_err(),
            "the hole can be read"
        );
        mapping
            .protect(Self::HIDDEN * PAGE, Self::SPAN * PAGE, READ_WRITE)
            .explain("mprotect")?;
        mapping
            .protect(Self::READ_ONLY * PAGE, Self::SPAN * PAGE, READ_WRITE)
            .explain("mprotect")?;
        for page in mapping.pages() {
            if (Self::HOLE..Self::HOLE + Self::SPAN).contains(&page) {
                continue;
            }
            match page % 3 {
                0 => mapping.check_page(page, 1, "mixed memory")?,
                _ => mapping.check_zero_page(page, "zero pages")?,
            }
        }
        Ok(())
    }
}

/// Many one-page entries that differ from both neighbours, so that the kernel cannot merge them.
struct Neighbours {
    mapping: Mapping,
    permissions: Vec<Option<String>>,
}

impl Neighbours {
    const PAGES: usize = 600;
    const PROTECTIONS: [i32; 3] = [READ_WRITE, READ, NONE];

    fn set_up() -> Outcome<Neighbours> {
        let mapping = Mapping::anonymous(Self::PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE)
            .explain("mmap of the neighbours")?;
        for page in mapping.pages() {
            mapping.fill_page(page, 2)?;
        }
        for page in mapping.pages() {
            mapping
                .protect(page * PAGE, PAGE, Self::PROTECTIONS[page % 3])
                .explain("mprotect of a neighbour")?;
        }
        let permissions = mapping.permissions()?;
        Ok(Neighbours {
            mapping,
            permissions,
        })
    }

    fn verify(&self) -> Outcome {
        ensure_equal!(
            self.mapping.permissions()?,
            self.permissions,
            "neighbours' permissions"
        );
        self.mapping
            .protect(0, Self::PAGES * PAGE, READ)
            .explain("mprotect")?;
        for page in self.mapping.pages() {
            self.mapping.check_page(page, 2, "neighbour pages")?;
        }
        Ok(())
    }
}

/// Memory at a low address and in the highest free pages below the end of user space.
struct Fixed {
    mappings: Vec<Mapping>,
}

impl Fixed {
    const PAGES: usize = 4;
    const LOW: usize = 0x20_0000;
    const END_OF_USER_SPACE: usize = 0x7fff_ffff_f000;

    fn set_up() -> Outcome<Fixed> {
        let length = Self::PAGES * PAGE;
        let low = Mapping::anonymous_at(Self::LOW, length).explain("mmap at a low address")?;
        // The stack may lie at the very end: take the first place below that is free.
        let high = (1..4096)
            .map(|step| Self::END_OF_USER_SPACE - step * length)
            .find_map(|address| Mapping::anonymous_at(address, length).ok())
            .explain("no free place at the end of user space")?;
        let mappings = vec![low, high];
        for mapping in &mappings {
            for page in mapping.pages() {
                mapping.fill_page(page, 3)?;
            }
        }
        Ok(Fixed { mappings })
    }

    fn verify(&self) -> Outcome {
        for mapping in &self.mappings {
            for page in mapping.pages() {
                mapping.check_page(page, 3, "memory at a fixed address")?;
            }
        }
        Ok(())
    }
}

/// The brk heap, grown by hand beside the allocator.
struct Heap {
    bytes: &'static mut [u8],
    end: usize,
}

impl Heap {
    const LENGTH: usize = 1 << 20;

    fn set_up() -> Outcome<Heap> {
        let start = grow(Self::LENGTH)?;
        // SAFETY: the range was just added to the heap for us alone; the allocator skips foreign growth.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, Self::LENGTH) };
        bytes.copy_from_slice(&crcoord_zoo::pattern::bytes(4, 0, Self::LENGTH));
        Ok(Heap {
            bytes,
            end: grow(0)?,
        })
    }

    fn verify(self) -> Outcome {
        let expected = crcoord_zoo::pattern::bytes(4, 0, Self::LENGTH);
        ensure!(*self.bytes == *expected, "wrong content in the heap");
        let end = grow(0)?;
        ensure!(
            end >= self.end,
            "the heap ends at {end:#x}, before {:#x}",
            self.end
        );
        let more = grow(16 * PAGE)? as *mut u8;
        // SAFETY: sixteen pages were just added at `more`.
        unsafe { more.write_volatile(1) };
        ensure_equal!(
            grow(0)?,
            more as usize + 16 * PAGE,
            "end of the heap after growth"
        );
        Ok(())
    }
}

/// Moves the program break and returns where it was.
fn grow(length: usize) -> Outcome<usize> {
    // SAFETY: growing the break takes nothing away from anybody.
    let old = unsafe { libc::sbrk(length as isize) } as usize;
    ensure!(
        old != usize::MAX,
        "sbrk: {}",
        std::io::Error::last_os_error()
    );
    Ok(old)
}

/// Two aligned huge pages' worth of memory that asks for huge pages.
struct Huge {
    mapping: Mapping,
    first_page: usize,
}

impl Huge {
    fn set_up() -> Outcome<Huge> {
        let mapping = Mapping::anonymous(3 * HUGE, READ_WRITE, libc::MAP_PRIVATE)
            .explain("mmap of the huge region")?;
        mapping
            .advise(libc::MADV_HUGEPAGE)
            .explain("MADV_HUGEPAGE")?;
        let first_page = (mapping.address().next_multiple_of(HUGE) - mapping.address()) / PAGE;
        for page in first_page..first_page + 2 * HUGE / PAGE {
            mapping.fill_page(page, 5)?;
        }
        Ok(Huge {
            mapping,
            first_page,
        })
    }

    fn verify(&self) -> Outcome {
        for page in self.mapping.pages() {
            if (self.first_page..self.first_page + 2 * HUGE / PAGE).contains(&page) {
                self.mapping.check_page(page, 5, "huge pages")?;
            } else {
                self.mapping
                    .check_zero_page(page, "untouched part of the huge region")?;
            }
        }
        Ok(())
    }
}

/// A page with code, readable and executable, that is run.
struct Code {
    mapping: Mapping,
}

impl Code {
    fn set_up() -> Outcome<Code> {
        let mapping = Mapping::anonymous(PAGE, READ_WRITE, libc::MAP_PRIVATE).explain("mmap")?;
        // mov eax, 4711; ret
        mapping
            .write(0, &[0xb8, 0x67, 0x12, 0, 0, 0xc3])
            .explain("code")?;
        mapping
            .protect(0, PAGE, READ | libc::PROT_EXEC)
            .explain("PROT_EXEC")?;
        let code = Code { mapping };
        code.verify()?;
        Ok(code)
    }

    fn verify(&self) -> Outcome {
        // SAFETY: the page holds exactly that function with the C calling convention.
        let function: extern "C" fn() -> i32 =
            unsafe { std::mem::transmute(self.mapping.address()) };
        ensure_equal!(function(), 4711, "result of the generated code");
        Ok(())
    }
}

/// Pages that are written one after the other the whole time. At any single instant a first part of
/// them shows the new generation and the rest the one before: a torn snapshot shows more than that.
struct Wave {
    mapping: Mapping,
}

impl Wave {
    const PAGES: usize = 256;
    const STEP: usize = PAGE / 8;

    fn set_up() -> Outcome<Wave> {
        let mapping = Mapping::anonymous(Self::PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE)
            .explain("mmap of the wave")?;
        Ok(Wave { mapping })
    }

    fn pass(&self, generation: u64) -> Outcome {
        // SAFETY: the mapping is readable and writable for the whole life of the program.
        let words = unsafe { self.mapping.words() };
        for page in 0..Self::PAGES {
            let old = words[page * Self::STEP].swap(generation, Ordering::Relaxed);
            if old != generation - 1 {
                return Err(Failure::new(format!(
                    "page {page} of the wave is of generation {old}, not {}: a torn snapshot",
                    generation - 1
                )));
            }
        }
        Ok(())
    }
}
