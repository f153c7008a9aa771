//! The host's side of a guest with husk's own init: what it is booted with, and the session about its process.

pub mod initramfs;

/// The guest's first process, a static program (firmware/init).
pub const INIT: &[u8] = include_bytes!(env!("HUSK_INIT"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_inside_needs_no_linker_of_the_guests() {
        assert!(INIT.starts_with(b"\x7fELF"));
        // ET_EXEC, since it is loaded where it was linked; a dynamic one would name its linker.
        assert_eq!(INIT[16..18], [2, 0]);
        assert!(!INIT.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }
}
