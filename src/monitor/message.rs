//! The messages between a machine's supervisor and its monitor process, each a packet of its own. The supervisor calls and
//! waits for the reply; the monitor reports events at any time. A monitor that was taken over may send anything.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use husk_protocol::frame::{self, Message, Reader};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Rate;
use crate::exit_latch::ExitReason;
use crate::foreign;

/// The maximum size of a packet, with the length that a frame starts with.
pub const PACKET_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 4;
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The maximum number of bytes offered to the serial port at once.
pub const INPUT_BYTES_MAX: usize = 4096;
/// The maximum length of a text: an error or a line of the log.
const TEXT_BYTES_MAX: usize = 1024;

/// A call of the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// Resume the guest. The first call; its reply reports whether the machine was built.
    Resume,
    /// The same with all network links down.
    ResumeUnplugged,
    /// Pause the guest.
    Pause,
    /// Press the power button.
    PressPowerButton,
    /// Offer bytes to the serial port.
    OfferInput(Vec<u8>),
    /// Set the memory of the guest, in MiB.
    SetMemoryTarget(u64),
    /// Set the rate limits of the disk with this index.
    SetDiskRate(usize, Limits),
    /// Set the rate limits of the network interface with this index.
    SetNetworkRate(usize, Limits),
    /// Set all network links up or down.
    SetLinks(bool),
    /// Report the machine's resource usage.
    Usage,
    /// Save the machine, which is paused. A packet with three files follows: one for its state, one for its memory, and one that
    /// says which pages of it are in use.
    Save,
    /// The same with only the pages that have changed since the memory was that of a file. A fourth file is for a bitmap of them.
    SaveChanges,
    /// Map the memory of the machine, which is paused, from the file that follows in a packet, to which it was just saved.
    Track,
    /// End the machine.
    End,
}

/// Rate limits. [`Rate`] itself leaves out limits that are not set, which this format cannot express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    bytes_per_second: Option<u64>,
    burst_bytes: Option<u64>,
    ops_per_second: Option<u64>,
    burst_ops: Option<u64>,
}

impl From<Rate> for Limits {
    fn from(Rate { bytes_per_second, burst_bytes, ops_per_second, burst_ops }: Rate) -> Limits {
        Limits { bytes_per_second, burst_bytes, ops_per_second, burst_ops }
    }
}

impl From<Limits> for Rate {
    fn from(Limits { bytes_per_second, burst_bytes, ops_per_second, burst_ops }: Limits) -> Rate {
        Rate { bytes_per_second, burst_bytes, ops_per_second, burst_ops }
    }
}

/// The reply to a call.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The guest runs. What the sandbox lacks because the host does not allow it, with the reasons.
    Started(Vec<String>),
    /// It was performed.
    Done,
    /// It failed, for this reason.
    Failed(String),
    /// The number of bytes that the serial port has accepted.
    Accepted(usize),
    /// The resource usage.
    Usage(Box<Usage>),
}

/// What happens in the monitor.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// A line for the log, and its level (`log::Level`, from 1 for an error).
    Log(usize, String),
    /// The serial port may accept input again.
    InputWanted,
    /// The machine has ended, all of its files are closed, and these steps were reached. `None` if the supervisor ended it.
    Ended(Option<ExitReason>, Vec<Option<Duration>>),
    /// All output of the serial port has been written, or its reader is gone.
    ConsoleClosed,
}

/// The resource usage of a monitor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time of the process.
    pub cpu: Duration,
    /// The memory that the guest may use, in MiB, if it has a balloon.
    pub target_mib: Option<u64>,
    /// Bytes read from disks, and written to them.
    pub disk_bytes: (u64, u64),
    /// Bytes received by the guest, and sent.
    pub network_bytes: (u64, u64),
    /// The number of network interfaces that vhost-net currently serves.
    pub vhost_interfaces: u32,
    /// The addresses of guest memory in the process.
    pub memory_ranges: Vec<Range<u64>>,
}

impl Message for Call {
    const MAX_BYTES: usize = MESSAGE_BYTES_MAX;
}

impl Message for Reply {
    const MAX_BYTES: usize = MESSAGE_BYTES_MAX;
}

impl Message for Event {
    const MAX_BYTES: usize = MESSAGE_BYTES_MAX;
}

/// `text`, shortened if it is too long for a message.
pub fn shortened(text: &str) -> String {
    foreign::start_of(text, TEXT_BYTES_MAX).to_owned()
}

/// Encodes `message` as a packet.
pub fn encode<M: Message>(message: &M) -> io::Result<Vec<u8>> {
    let mut packet = Vec::new();
    frame::write(message, &mut packet).map_err(io::Error::other)?;
    Ok(packet)
}

/// Decodes a packet, which must contain exactly one message.
pub fn decode<M: Message>(packet: &[u8]) -> io::Result<M> {
    let mut reader = Reader::default();
    reader.push(packet);
    let decoded = reader.take().map_err(io::Error::other)?;
    decoded.ok_or_else(|| ErrorKind::InvalidData.into())
}

/// Sends `message`, waiting for room.
pub fn send<M: Message>(socket: &UnixDatagram, message: &M) -> io::Result<()> {
    let packet = encode(message)?;
    uninterrupted(|| socket.send(&packet)).map(drop)
}

/// Receives the next message. Fails with `UnexpectedEof` if the other side is gone.
pub fn receive<M: Message + DeserializeOwned>(socket: &UnixDatagram) -> io::Result<M> {
    let mut packet = [0; PACKET_BYTES_MAX];
    match uninterrupted(|| socket.recv(&mut packet))? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        len => decode(packet.get(..len).unwrap_or_default()),
    }
}

/// Makes a call again that a signal has interrupted.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_arrive_with_the_limits_that_are_not_set() {
        for rate in [Rate::default(), Rate { bytes_per_second: Some(7), burst_ops: Some(1), ..Rate::default() }] {
            let packet = encode(&Call::SetDiskRate(2, rate.into())).unwrap();
            let Call::SetDiskRate(2, limits) = decode(&packet).unwrap() else { panic!("another call") };
            assert_eq!(Rate::from(limits), rate);
        }
    }

    #[test]
    fn a_packet_holds_exactly_one_message() {
        let packet = encode(&Event::Log(1, "x".into())).unwrap();
        assert!(matches!(decode(&packet), Ok(Event::Log(1, text)) if text == "x"));
        assert!(decode::<Event>(&packet[..packet.len() - 1]).is_err());
        assert!(decode::<Event>(&u32::MAX.to_le_bytes()).is_err());
        let long = shortened(&"ä".repeat(TEXT_BYTES_MAX));
        assert!(encode(&Reply::Failed(long)).unwrap().len() <= PACKET_BYTES_MAX);
    }
}
