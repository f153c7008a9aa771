//! The block device (virtio 1.2 §5.2).

pub mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::log_rate::LogRate;
use super::queue::{Chain, Virtqueue};
use super::{ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, VirtioDevice};
use crate::backend::disk::{
    Blocking, Completion, DiskBackend, Operation, PlainDisk, Request, SECTOR_BYTES, Shortcuts, UringDisk,
};
use crate::backend::rate::{Limiter, RateControl};
use crate::config::{Aio, Rate, disk_name};
use crate::memory::GuestBuffers;
use crate::resources::disk::{DiskFile, DiskImage};

use request::{
    Action, BlockRequest, DISCARD_SECTORS_MAX, DiskShape, SEGMENT_BYTES_MAX, SEGMENTS_MAX, Status,
    WRITE_ZEROES_SECTORS_MAX,
};

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 256;

// Feature bits, virtio 1.2 §5.2.3.
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The size of the response to VIRTIO_BLK_T_GET_ID (virtio 1.2 §5.2.6).
const ID_BYTES: usize = 20;
/// The maximum memory that a guest can make a queue of a disk use, in bytes: for every request in flight, the buffers of a full
/// chain, each of which may span two memory regions. The back end has its own budget.
pub const BUDGET_BYTES: u64 = QUEUE_SIZE as u64 * 2 * QUEUE_SIZE as u64 * size_of::<libc::iovec>() as u64;
/// The size of requests in flight at which no further one is started, so that the kernel's memory for them is bounded.
const IN_FLIGHT_BYTES_MAX: u64 = 32 << 20;
/// The maximum amount transferred in one turn of the worker, before it checks its stop event again.
const TURN_BYTES: u64 = 4 << 20;
/// The number of requests started before completed ones are reaped, so that a driver that polls the used ring makes
/// progress. Fewer take more time each: with 8, cached reads at depth 32 took 1.2 times as long.
const REAP_INTERVAL: u32 = 16;
/// The cost of a request in a turn in addition to its data, so that every turn ends.
const REQUEST_COST_BYTES: u64 = 16 << 10;

/// A handle to a disk, usable on any thread, whether the machine is running or not.
#[derive(Debug, Clone)]
pub struct DiskHandle {
    /// The guest's I/O statistics.
    pub counters: Arc<Counters>,
    /// The rate limits.
    pub rate: RateControl,
}

/// I/O statistics of a disk since the machine started, counted at completion.
#[derive(Debug, Default)]
pub struct Counters {
    /// Read requests.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Write requests.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Flush requests.
    pub flushes: AtomicU64,
    /// Discard and write zeroes requests.
    pub discards: AtomicU64,
    /// Whether the file of the disk lacks something of what was written when the device was last stopped.
    pub is_unsettled: AtomicBool,
}

impl Counters {
    fn count(&self, operation: Operation, len_bytes: u64) {
        let (requests, bytes) = match operation {
            Operation::Read => (&self.reads, Some(&self.read_bytes)),
            Operation::Write => (&self.writes, Some(&self.written_bytes)),
            Operation::Flush => (&self.flushes, None),
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => (&self.discards, None),
        };
        requests.fetch_add(1, Ordering::Relaxed);
        if let Some(bytes) = bytes {
            bytes.fetch_add(len_bytes, Ordering::Relaxed);
        }
    }
}

/// Creates a block device for an opened disk, and its handle.
pub fn device(disk: DiskFile) -> io::Result<(VirtioDevice, DiskHandle)> {
    let DiskFile { image, path, capacity_bytes, readonly, block_bytes, physical_block_bytes, id, aio, queues, rate } =
        disk;
    let name = format!("disk {}", disk_name(&path));
    let shape = DiskShape { capacity_bytes, readonly, block_bytes, physical_block_bytes };
    let backends = match image {
        DiskImage::Raw(disk) => (0..queues).map(|_| raw_backend(disk.clone(), aio)).collect::<io::Result<_>>()?,
        DiskImage::Qcow2(disk) => vec![Box::new(Blocking::new(*disk)) as Box<dyn DiskBackend>],
    };
    device_on(backends, shape, &name, id.as_deref().unwrap_or_default(), rate)
}

fn raw_backend(disk: PlainDisk, aio: Aio) -> io::Result<Box<dyn DiskBackend>> {
    Ok(match aio {
        Aio::Auto => Box::new(UringDisk::new(disk, Shortcuts::Allowed)?),
        Aio::IoUring => Box::new(UringDisk::new(disk, Shortcuts::Never)?),
        Aio::Threads => Box::new(Blocking::new(disk)),
    })
}

/// Creates a block device with a queue for each of `disks`, back ends for the same disk of this `shape`. `name` is used
/// in logs, `id` is the serial number.
pub fn device_on(
    disks: Vec<Box<dyn DiskBackend>>,
    shape: DiskShape,
    name: &str,
    id: &str,
    rate: Rate,
) -> io::Result<(VirtioDevice, DiskHandle)> {
    let rate = RateControl::new(rate);
    let counters = Arc::<Counters>::default();
    let writable = if shape.readonly { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
    let several = if disks.len() > 1 { F_MQ } else { 0 };
    let config = Arc::new(ConfigSpace::new(config(&shape, disks.len() as u16), 0..0));
    let group = |disk| -> io::Result<QueueGroup> {
        let block = Block::new(disk, shape, name, id, rate.limiter()?, counters.clone());
        Ok(QueueGroup { sizes: vec![QUEUE_SIZE], handler: Box::new(block) })
    };
    let device = VirtioDevice {
        device_type: DEVICE_TYPE,
        name: name.to_owned(),
        features: F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | writable | several,
        feature_needs: &[],
        config,
        queue_groups: disks.into_iter().map(group).collect::<io::Result<_>>()?,
    };
    Ok((device, DiskHandle { counters, rate }))
}

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4), field by field.
fn config(shape: &DiskShape, queues: u16) -> Vec<u8> {
    let physical_block_exp = (shape.physical_block_bytes / shape.block_bytes).max(1).ilog2() as u8;
    let mut bytes = Vec::new();
    bytes.extend((shape.capacity_bytes / SECTOR_BYTES).to_le_bytes());
    bytes.extend(SEGMENT_BYTES_MAX.to_le_bytes());
    bytes.extend(SEGMENTS_MAX.to_le_bytes());
    bytes.extend([0; 4]); // geometry: not offered
    bytes.extend(shape.block_bytes.to_le_bytes()); // blk_size
    bytes.extend([physical_block_exp, 0]); // and alignment_offset
    bytes.extend((1_u16 << physical_block_exp).to_le_bytes()); // min_io_size, in logical blocks
    bytes.extend(0_u32.to_le_bytes()); // opt_io_size: none better than another
    bytes.extend([0; 2]); // writeback: not offered
    bytes.extend(queues.to_le_bytes()); // num_queues
    bytes.extend(DISCARD_SECTORS_MAX.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes()); // max_discard_seg
    bytes.extend((shape.physical_block_bytes / SECTOR_BYTES as u32).max(1).to_le_bytes()); // discard_sector_alignment
    bytes.extend(WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes()); // max_write_zeroes_seg
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
    bytes
}

/// The device side of a queue, and its requests in flight.
struct Block {
    disk: Box<dyn DiskBackend>,
    shape: DiskShape,
    name: String,
    id: [u8; ID_BYTES],
    limiter: Limiter,
    counters: Arc<Counters>,
    /// The driver does not support flush: writes must be durable before completion (virtio 1.2 §5.2.6.2).
    write_through: bool,
    chain: Chain,
    /// Indexed by the request's token.
    in_flight: Vec<Option<InFlight>>,
    /// The size of their buffers.
    in_flight_bytes: u64,
    free_tokens: Vec<usize>,
    spare_buffers: Vec<GuestBuffers>,
    log_rate: LogRate,
}

/// The completion of a request once the disk is done.
struct InFlight {
    head: u16,
    status: GuestAddress,
    /// The operation, and its size in bytes.
    operation: Operation,
    len_bytes: u64,
    /// The same, or the length of a range to discard or zero: what a stop may have to wait for.
    counted_bytes: u64,
    /// The bytes written to the driver's buffers on success, excluding the status.
    filled_bytes: u32,
    /// Whether it must be followed by a flush before completion.
    then_flush: bool,
}

impl Block {
    fn new(
        disk: Box<dyn DiskBackend>,
        shape: DiskShape,
        name: &str,
        id: &str,
        limiter: Limiter,
        counters: Arc<Counters>,
    ) -> Block {
        let mut id_bytes = [0; ID_BYTES];
        id_bytes.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        Block {
            disk,
            shape,
            name: name.to_owned(),
            id: id_bytes,
            limiter,
            counters,
            write_through: true,
            chain: Chain::default(),
            in_flight: (0..QUEUE_SIZE).map(|_| None).collect(),
            in_flight_bytes: 0,
            free_tokens: (0..usize::from(QUEUE_SIZE)).collect(),
            spare_buffers: Vec::new(),
            log_rate: LogRate::default(),
        }
    }

    /// Takes chains until there are none, the turn's budget is used up, or the maximum is in flight.
    fn take(&mut self, queue: &mut Virtqueue) -> Result<Progress, RingError> {
        let mut turn_bytes = 0;
        for taken in 1.. {
            if self.is_full() || taken % REAP_INTERVAL == 0 {
                self.disk.kick();
                self.reap(queue)?;
            }
            if self.is_full() {
                return Ok(Progress::Blocked);
            }
            let Some(token) = self.free_tokens.last().copied() else { return Ok(Progress::Blocked) };
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let Some(cost_bytes) = self.begin(token, queue)? else { return Ok(Progress::Blocked) };
            turn_bytes += REQUEST_COST_BYTES + cost_bytes;
            if turn_bytes >= TURN_BYTES {
                break;
            }
        }
        Ok(Progress::More)
    }

    /// Whether a further request must wait for one in flight.
    fn is_full(&self) -> bool {
        self.free_tokens.is_empty() || self.in_flight_bytes >= IN_FLIGHT_BYTES_MAX
    }

    /// Starts the request in `self.chain`, with `token` if it involves the disk. Returns its cost in the turn, or
    /// `None` if the rate limit delays it: it then stays available and is read again later.
    fn begin(&mut self, token: usize, queue: &mut Virtqueue) -> Result<Option<u64>, RingError> {
        let mut buffers = self.spare_buffers.pop().unwrap_or_else(|| GuestBuffers::new(queue.memory().clone()));
        let BlockRequest { status, action } = BlockRequest::parse(&self.chain, &self.shape, &mut buffers)?;
        let counted_bytes = match action {
            // The host may have to write zeroes like any data, and discards update metadata.
            Ok(Action::Disk {
                operation: Operation::WriteZeroes { len_bytes, .. } | Operation::Discard { len_bytes },
                ..
            }) => len_bytes,
            _ => buffers.len_bytes(),
        };
        if !self.limiter.admit(counted_bytes) {
            buffers.clear();
            self.spare_buffers.push(buffers);
            queue.put_back();
            return Ok(None);
        }
        let head = self.chain.head();
        match action {
            Ok(Action::Disk { operation, offset_bytes }) => {
                let len_bytes = buffers.len_bytes();
                self.free_tokens.pop();
                self.in_flight_bytes += counted_bytes;
                self.in_flight[token] = Some(InFlight {
                    head,
                    status,
                    operation,
                    len_bytes,
                    counted_bytes,
                    filled_bytes: if operation == Operation::Read { len_bytes as u32 } else { 0 },
                    then_flush: self.write_through && !matches!(operation, Operation::Read | Operation::Flush),
                });
                // A request that may take long ends the turn, so that a stop waits for few of them: see `is_full`.
                let is_short = operation == Operation::Read || operation == Operation::Write && !self.write_through;
                self.disk.submit(Request { token, operation, offset_bytes, buffers });
                Ok(Some(if is_short { len_bytes } else { TURN_BYTES }))
            }
            Ok(Action::GetId) => {
                self.spare_buffers.push(buffers);
                let (result, filled_bytes) = self.write_id(queue);
                finish(queue, head, status, result, filled_bytes)?;
                Ok(Some(0))
            }
            Err(refusal) => {
                self.spare_buffers.push(buffers);
                finish(queue, head, status, refusal, 0)?;
                Ok(Some(0))
            }
        }
    }

    fn write_id(&self, queue: &Virtqueue) -> (Status, u32) {
        let mut rest = &self.id[..];
        for range in BlockRequest::data_to_fill(&self.chain) {
            let (piece, behind) = rest.split_at(rest.len().min(range.len_bytes as usize));
            if queue.memory().write_slice(piece, range.address).is_err() {
                return (Status::IoError, 0);
            }
            rest = behind;
        }
        (Status::Ok, (ID_BYTES - rest.len()) as u32)
    }

    /// Completes requests that the disk has finished.
    fn reap(&mut self, queue: &mut Virtqueue) -> Result<(), RingError> {
        while let Some(completion) = self.disk.reap() {
            self.complete(completion, queue)?;
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion, queue: &mut Virtqueue) -> Result<(), RingError> {
        let Completion { request: Request { token, operation, offset_bytes, mut buffers }, result } = completion;
        let Some(mut request) = self.in_flight.get_mut(token).and_then(Option::take) else { return Ok(()) };
        if result.is_ok() && std::mem::take(&mut request.then_flush) {
            self.in_flight[token] = Some(request);
            self.disk.submit(Request { token, operation: Operation::Flush, offset_bytes: 0, buffers });
            self.disk.kick();
            return Ok(());
        }
        self.free_tokens.push(token);
        self.in_flight_bytes -= request.counted_bytes;
        buffers.clear();
        self.spare_buffers.push(buffers);
        match result {
            Ok(()) => {
                self.counters.count(request.operation, request.len_bytes);
                finish(queue, request.head, request.status, Status::Ok, request.filled_bytes)
            }
            Err(error) => {
                if self.log_rate.allows() {
                    log::warn!("{}: {operation:?} at byte {offset_bytes} failed: {error}", self.name);
                }
                finish(queue, request.head, request.status, Status::IoError, 0)
            }
        }
    }
}

/// The status byte is written last, before the chain is returned.
fn finish(
    queue: &mut Virtqueue,
    head: u16,
    address: GuestAddress,
    status: Status,
    filled_bytes: u32,
) -> Result<(), RingError> {
    let written = queue.memory().write_obj(status as u8, address);
    written.map_err(|_| RingError::Chain("the status byte is not in memory"))?;
    queue.push(head, filled_bytes + 1)
}

impl QueueHandler for Block {
    fn start(&mut self, features: u64) {
        self.write_through = features & F_FLUSH == 0;
    }

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let Some(queue) = queues.get_mut(index) else { return Ok(Progress::Drained) };
        self.reap(queue)?;
        let left = self.take(queue);
        // Also before an error, so that a stop has to wait only for completions.
        self.disk.kick();
        self.reap(queue)?;
        left
    }

    fn may_poll(&self) -> bool {
        self.free_tokens.len() == self.in_flight.len()
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.disk.completion_fd().into_iter().chain([self.limiter.wake_fd()]).collect()
    }

    fn drain(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        let Some(queue) = queues.first_mut() else { return Ok(()) };
        let mut result = Ok(());
        // A completed write may require a flush, which is then in flight itself.
        while self.free_tokens.len() < self.in_flight.len() {
            self.disk.drain();
            result = result.and(self.reap(queue));
        }
        let settled = self.disk.settle();
        self.counters.is_unsettled.store(settled.is_err(), Ordering::Relaxed);
        if let Err(error) = settled {
            log::warn!("{}: write its tables: {error}", self.name);
        }
        result
    }
}
