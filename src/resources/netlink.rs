//! Requests to the kernel about interfaces, addresses, routes and queueing disciplines (rtnetlink(7)), in the network namespace
//! of the calling thread.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::io::retry_on_intr;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// What the kernel sends at once is at most this long (linux/netlink.h, NLMSG_GOODSIZE, and `netlink_dump`).
const ANSWER_BYTES_MAX: usize = 32 << 10;
/// Messages start at multiples of this (linux/netlink.h, NLMSG_ALIGNTO).
const ALIGNMENT: usize = 4;

/// A connection to the kernel.
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a connection to the namespace of the calling thread, which it keeps to.
    pub fn open() -> io::Result<Netlink> {
        // No protocol is protocol 0, NETLINK_ROUTE.
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map(Netlink)
            .map_err(Into::into)
    }

    /// Changes something, with the NLM_F_* flags `flags`.
    pub fn change(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(request, flags | NLM_F_ACK)?;
        self.receive(|_| {}).map(drop)
    }

    /// Lists everything of one kind.
    pub fn list(&self, request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.send(request, NLM_F_DUMP)?;
        let mut listed = Vec::new();
        while !self.receive(|message| listed.push(message))? {}
        Ok(listed)
    }

    fn send(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        // No sequence number is needed: there is one request at a time.
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        retry_on_intr(|| send(&self.0, &bytes, SendFlags::empty()))?;
        Ok(())
    }

    /// Receives messages, which the kernel has sent before the request returns or sends while they are read. Returns whether the
    /// answer is complete.
    fn receive(&self, mut take: impl FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        let (count, _) = retry_on_intr(|| recv(&self.0, &mut buffer[..], RecvFlags::empty()))?;
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            let length = (message.header.length as usize).next_multiple_of(ALIGNMENT);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(true),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => take(message),
                _ => {}
            }
            rest = rest.get(length.max(ALIGNMENT)..).unwrap_or_default();
        }
        Ok(false)
    }
}
