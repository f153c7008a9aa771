//! Commands of the control queue (virtio 1.2 §5.1.6.5).

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};
use vm_memory::Bytes;

use crate::memory::GuestMemory;
use crate::virtio::RingError;
use crate::virtio::queue::{self, Chain};

/// Class, command, and the number of queue pairs: `struct virtio_net_ctrl_hdr`, `struct virtio_net_ctrl_mq`.
const PAIRS_SET_BYTES: usize = 4;

/// The number of queue pairs that `command` requests; `None` for other commands or lengths.
pub fn pairs_asked_for(memory: &GuestMemory, command: &Chain) -> Option<usize> {
    if queue::len_bytes(command.readable()) != PAIRS_SET_BYTES as u64 {
        return None;
    }
    let [class, what, pairs @ ..] = queue::read_front::<PAIRS_SET_BYTES>(memory, command.readable())?;
    let is_known = (u32::from(class), u32::from(what)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    is_known.then_some(u16::from_le_bytes(pairs).into())
}

/// Writes the command's status to its first writable byte. Returns the number of bytes written, which is 0 if the
/// driver left no room.
pub fn answer(memory: &GuestMemory, command: &Chain, done: bool) -> Result<u32, RingError> {
    let Some(place) = command.writable().first() else { return Ok(0) };
    let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
    memory.write_obj(answer, place.address).map_err(|_| RingError::Chain("an answer outside of memory"))?;
    Ok(1)
}
