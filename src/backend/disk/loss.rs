//! What a failed flush means to a disk in the host's page cache, whatever executes its requests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether writes in the page cache were lost. All clones are one.
///
/// Linux reports that to a single fsync(2). It then takes the pages for clean, so that the next fsync would succeed without
/// having written them. Nothing that the guest wrote since its last flush can be relied on any more.
#[derive(Debug, Clone, Default)]
pub struct Loss(Arc<AtomicBool>);

impl Loss {
    /// What to report to the guest about a flush that ended with `result`: after one has failed, all fail.
    pub fn after_flush(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.0.store(true, Ordering::Relaxed);
        } else if self.0.load(Ordering::Relaxed) {
            return Err(io::Error::other("an earlier flush failed: the host has lost writes"));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failed_flush_all_fail_in_every_queue() {
        let (first, other) = (Loss::default(), Loss::default());
        let second = first.clone();
        assert!(first.after_flush(Ok(())).is_ok() && second.after_flush(Ok(())).is_ok());
        let error = first.after_flush(Err(io::Error::from_raw_os_error(libc::EIO))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(second.after_flush(Ok(())).is_err() && first.after_flush(Ok(())).is_err());
        assert!(other.after_flush(Ok(())).is_ok());
    }
}
