//! Returns memory that only the start of the process needed to the kernel.
#![allow(unsafe_code)]

use std::slice;
use std::time::{Duration, Instant};

/// The granularity of mappings.
const PAGE_BYTES: usize = 4096;

/// How long nothing happens before a process is trimmed.
const TRIM_AFTER: Duration = Duration::from_millis(500);

/// Trims a process once, when nothing has happened for a while.
#[derive(Debug)]
pub struct IdleTrim(Option<Instant>);

impl IdleTrim {
    /// Starts waiting now.
    pub fn start() -> IdleTrim {
        IdleTrim(Some(Instant::now() + TRIM_AFTER))
    }

    /// When [`IdleTrim::check`] trims the process if nothing happens until then; `None` if it was trimmed.
    pub fn at(&self) -> Option<Instant> {
        self.0
    }

    /// Trims the process if it is time. If there are events, that is put off.
    pub fn check(&mut self, has_events: bool) {
        match self.0 {
            Some(_) if has_events => *self = IdleTrim::start(),
            Some(at) if Instant::now() >= at => {
                trim();
                self.0 = None;
            }
            _ => {}
        }
    }
}

/// Unmaps the pages of the executable and of free heap memory. Code and constants that are used again are mapped again from
/// the page cache, at a microsecond per page fault; those of the start-up are a few MiB.
pub fn trim() {
    for segment in read_only_segments() {
        // SAFETY: the range is a mapping of the executable file without write access: its pages equal those of the file, which
        // are mapped again on the next access (madvise(2), MADV_DONTNEED).
        unsafe { libc::madvise(segment.start as *mut libc::c_void, segment.len(), libc::MADV_DONTNEED) };
    }
    // SAFETY: it only affects free memory of the allocator (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
}

/// The whole pages of the executable that are mapped without write access.
fn read_only_segments() -> Vec<std::ops::Range<usize>> {
    // SAFETY: getauxval accesses no memory of ours.
    let [headers, count] = [libc::AT_PHDR, libc::AT_PHNUM].map(|entry| unsafe { libc::getauxval(entry) } as usize);
    if headers == 0 {
        return Vec::new();
    }
    // SAFETY: the kernel passes the address and number of the program headers, which the first segment contains and which
    // are mapped as long as the process exists (getauxval(3)).
    let headers = unsafe { slice::from_raw_parts(headers as *const libc::Elf64_Phdr, count) };
    let Some(own) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else { return Vec::new() };
    let base = (std::ptr::from_ref(&headers[0]) as usize).wrapping_sub(own.p_vaddr as usize);
    let of_file = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    let pages = |header: &libc::Elf64_Phdr| {
        let start = base.wrapping_add(header.p_vaddr as usize);
        let end = start.wrapping_add(header.p_filesz as usize);
        start.next_multiple_of(PAGE_BYTES)..end / PAGE_BYTES * PAGE_BYTES
    };
    headers.iter().filter(of_file).map(pages).filter(|pages| !pages.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::smaps;

    /// The resident pages of the executable's text.
    fn resident_text_bytes() -> u64 {
        smaps::bytes_at(resident_text_bytes as *const () as usize, "Rss:")
    }

    #[test]
    fn trimmed_code_is_not_resident_and_runs_again() {
        let mut bytes = vec![0_u8; 4096];
        // Maps more of the code than this test needs.
        let _ = std::process::Command::new("true").status();
        let text_bytes = read_only_segments().iter().map(ExactSizeIterator::len).max().unwrap() as u64;
        // Other tests run at the same time, and need code.
        let is_trimmed = (0..100).any(|_| {
            trim();
            resident_text_bytes() < text_bytes / 2
        });
        bytes.fill(1);
        assert!(is_trimmed && bytes.iter().all(|byte| *byte == 1), "{} of {text_bytes}", resident_text_bytes());
    }
}
