//! The host's side of a guest with husk's own init.

/// The guest's first process, a static program (firmware/init).
pub const INIT: &[u8] = include_bytes!(env!("HUSK_INIT"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_inside_is_small_and_needs_no_linker_of_the_guests() {
        assert!(INIT.starts_with(b"\x7fELF"));
        // ET_EXEC, since it is loaded where it was linked; PT_INTERP would name a dynamic linker.
        assert_eq!(INIT[16..18], [2, 0]);
        assert!(!INIT.windows(8).any(|bytes| bytes == b"/ld-linu"));
        assert!(INIT.len() < 1536 << 10, "{} bytes", INIT.len());
    }
}
