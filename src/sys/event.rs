//! Event counters between threads, and between husk and the kernel.

use std::io;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Creates an event counter (eventfd(2)) that does not block, and that programs started by husk do not inherit.
pub fn create() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn started_programs_do_not_inherit_events() {
        let event = create().unwrap();
        let path = format!("/proc/self/fd/{}", event.as_raw_fd());
        assert!(std::fs::symlink_metadata(&path).is_ok());
        assert!(!std::process::Command::new("test").args(["-L", &path]).status().unwrap().success());
    }
}
