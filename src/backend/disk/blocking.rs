//! A back end for disks with blocking system calls: requests are complete when `submit` returns.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::{Completion, DiskBackend, Request};

/// A disk that executes requests one by one on the calling thread.
pub trait BlockingDisk: Send {
    /// Executes `request`. After an error it may have been executed in part.
    fn execute(&mut self, request: &mut Request) -> io::Result<()>;

    /// As [`DiskBackend::settle`].
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The back end for such a disk.
#[derive(Debug)]
pub struct Blocking<D> {
    disk: D,
    done: VecDeque<Completion>,
}

impl<D: BlockingDisk> Blocking<D> {
    /// Creates a back end for `disk`.
    pub fn new(disk: D) -> Blocking<D> {
        Blocking { disk, done: VecDeque::new() }
    }
}

impl<D: BlockingDisk> DiskBackend for Blocking<D> {
    fn submit(&mut self, mut request: Request) {
        let result = self.disk.execute(&mut request);
        self.done.push_back(Completion { request, result });
    }

    fn reap(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn drain(&mut self) {}

    fn settle(&mut self) -> io::Result<()> {
        self.disk.settle()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::disk::Operation;
    use crate::memory::{self, GuestBuffers};

    struct Odd;

    impl BlockingDisk for Odd {
        fn execute(&mut self, request: &mut Request) -> io::Result<()> {
            if request.offset_bytes % 2 == 1 { Ok(()) } else { Err(io::ErrorKind::Other.into()) }
        }
    }

    #[test]
    fn each_request_is_completed_once_in_order_with_its_own_result() {
        let (mut disk, memory) = (Blocking::new(Odd), Arc::new(memory::reserve(1).unwrap()));
        for token in 0..3 {
            let buffers = GuestBuffers::new(memory.clone());
            disk.submit(Request { token, operation: Operation::Flush, offset_bytes: token as u64, buffers });
        }
        disk.drain();
        let done: Vec<_> = std::iter::from_fn(|| disk.reap()).map(|c| (c.request.token, c.result.is_ok())).collect();
        assert_eq!(done, [(0, false), (1, true), (2, false)]);
    }
}
