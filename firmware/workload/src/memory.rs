//! Memory tasks: copying, and page faults.

use std::hint::black_box;

use husk_init::errors::{Context, Failure};

use crate::sys::Pages;
use crate::task::Task;

/// The size of both buffers, larger than a processor's caches.
const BUFFER_BYTES: usize = 32 << 20;
/// The amount mapped at a time.
const BLOCK_BYTES: usize = 16 << 20;
pub const PAGE_BYTES: usize = 4096;

/// Copies between two buffers that have been touched before.
pub fn copy(amount: u64) -> Result<Task, Failure> {
    let map = || Pages::map(BUFFER_BYTES).context("map a buffer");
    let (mut from, mut to) = (map()?, map()?);
    from.fill(0x5a);
    to.fill(0xa5);
    Ok(Box::new(move || {
        let mut left = amount;
        while left > 0 {
            let count = left.min(BUFFER_BYTES as u64) as usize;
            let (Some(source), Some(target)) = (from.get(..count), to.get_mut(..count)) else { break };
            black_box(target).copy_from_slice(black_box(source));
            left -= count as u64;
        }
        Ok(())
    }))
}

/// Touches new pages, with a page fault each.
pub fn touch(pages: u64) -> Result<Task, Failure> {
    Ok(Box::new(move || {
        let mut left = pages;
        while left > 0 {
            let count = left.min((BLOCK_BYTES / PAGE_BYTES) as u64);
            let mut block = Pages::map(count as usize * PAGE_BYTES).context("map memory")?;
            block.refuse_huge_pages();
            for page in block.chunks_mut(PAGE_BYTES) {
                page.iter_mut().take(1).for_each(|byte| *black_box(byte) = 1);
            }
            left -= count;
        }
        Ok(())
    }))
}
