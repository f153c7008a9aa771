//! The entropy device (virtio 1.2 §5.4), backed by getrandom(2).

use std::sync::Arc;

use vm_memory::Bytes;

use super::queue::{self, Chain, Virtqueue};
use super::{ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, VirtioDevice};
use crate::sys;

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 64;
/// The maximum size of one request. A driver asks again for the rest.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// The number of requests served before the worker checks its stop event.
const REQUESTS_PER_TURN: usize = 16;

/// Creates an entropy device, which returns data from getrandom(2).
pub fn device() -> VirtioDevice {
    VirtioDevice {
        device_type: DEVICE_TYPE,
        name: "virtio-rng".to_owned(),
        features: 0,
        feature_needs: &[],
        config: Arc::new(ConfigSpace::new(Vec::new(), 0..0)),
        queue_groups: vec![QueueGroup { sizes: vec![QUEUE_SIZE], handler: Box::new(Entropy::default()) }],
    }
}

#[derive(Default)]
struct Entropy {
    chain: Chain,
}

impl QueueHandler for Entropy {
    fn start(&mut self, _features: u64) {}

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let Some(queue) = queues.get_mut(index) else { return Ok(Progress::Drained) };
        for _ in 0..REQUESTS_PER_TURN {
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let written_bytes = fill(&self.chain, queue);
            queue.push(self.chain.head(), written_bytes)?;
        }
        Ok(Progress::More)
    }
}

/// Fills the writable part of `chain` up to the limit or the first bad address. Returns the number of bytes written.
fn fill(chain: &Chain, queue: &Virtqueue) -> u32 {
    let mut bytes = [0; 4096];
    let mut written_bytes = 0;
    for range in queue::part(chain.writable(), 0, REQUEST_BYTES_MAX) {
        let mut done = 0;
        while done < range.len_bytes {
            let len = (range.len_bytes - done).min(bytes.len() as u32);
            let piece = &mut bytes[..len as usize];
            let address = range.address.0.saturating_add(done.into());
            if sys::getrandom(piece).is_err()
                || queue.memory().write_slice(piece, vm_memory::GuestAddress(address)).is_err()
            {
                return written_bytes;
            }
            done += len;
            written_bytes += len;
        }
    }
    written_bytes
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

    fn started() -> Driver {
        let mut driver = Driver::new(device());
        driver.start();
        driver
    }

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let mut driver = started();
        assert_eq!(driver.transact(0, &[(BUFFERS, 32, WRITE), (BUFFERS + 0x1000, 32, WRITE)]), 64);
        let mut bytes = [[0; 32]; 3];
        for (bytes, address) in bytes.iter_mut().zip([BUFFERS, BUFFERS + 0x1000, BUFFERS + 32]) {
            driver.memory.read_slice(bytes, GuestAddress(address)).unwrap();
        }
        assert_ne!(bytes[0], bytes[1]);
        assert_ne!(bytes[0], [0; 32]);
        assert_eq!(bytes[2], [0; 32], "written beyond the buffer");
    }

    #[test]
    fn a_request_above_64_kib_gets_64_kib() {
        let mut driver = started();
        assert_eq!(driver.transact(0, &[(BUFFERS, 1 << 20, WRITE)]), 64 << 10);
        let beyond: u64 = driver.memory.read_obj(GuestAddress(BUFFERS + (64 << 10))).unwrap();
        assert_eq!(beyond, 0);
        // Repeating the same buffer does not exceed the limit.
        assert_eq!(driver.transact(0, &[(BUFFERS, u32::MAX / 64, WRITE); 60]), 64 << 10);
    }

    #[test]
    fn empty_and_invalid_requests_get_nothing() {
        let mut driver = started();
        assert_eq!(driver.transact(0, &[(BUFFERS, 16, 0)]), 0);
        assert_eq!(driver.transact(0, &[(1 << 40, 16, WRITE)]), 0);
        assert_eq!(driver.transact(0, &[(u64::MAX - 4, 16, WRITE)]), 0);
        assert_eq!(driver.transact(0, &[(BUFFERS, 8, WRITE), (1 << 40, 8, WRITE)]), 8);
    }
}
