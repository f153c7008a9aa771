//! Settings of the C library's allocator.
#![allow(unsafe_code)]

/// Makes all threads allocate from one arena (mallopt(3)). Further arenas read files below /proc when they shrink.
pub fn use_one_arena() {
    // SAFETY: it only changes a number, before other threads exist that could read it.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
