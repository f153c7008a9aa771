//! The network back end on passt, and the ways to start passt: before the machine, or when its guest needs the network.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm_sys_util::eventfd::EventFd;

use super::neighbors::{announcements, arp_request};
use super::process::Process;
use super::{Missing, PROGRAM, Routes, SOCKET_BUFFER_BYTES, arguments, is_installed};
use crate::backend::net::{
    ATTEMPT_BYTES_MAX, Attempt, Attempts, FRONT_BYTES, Header, NetBackend, StreamNet, expects_response, is_end,
};
use crate::config::{MacAddress, PortForward, Protocol, UserNetwork};
use crate::memory::GuestBuffers;
use crate::resources::attendant;
use crate::resources::ports::{self, Turn};
use crate::resources::resolver;
use crate::sys;
use crate::sys::event;
use crate::sys::shared::SharedFlag;

/// How long passt may take to open its ports, on a busy host.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(10);
/// The EtherType of ARP frames.
const ETHERTYPE_ARP: [u8; 2] = [8, 6];
/// How long to wait for the error of a passt process that is likely to fail.
const STARTUP_ERROR_TIMEOUT: Duration = Duration::from_millis(500);
/// How often a guest that needs its network makes us look for a default route while the host has none.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The machine's end of passt's socket. Dropping it terminates passt.
pub struct Passt {
    net: StreamNet,
    shared: Arc<Shared>,
    /// `None` if it belongs to the supervisor.
    keeper: Option<Keeper>,
    /// Whether passt has not been needed yet. Until then, frames that expect no response are dropped.
    is_idle: bool,
    /// When passt was last requested.
    asked: Option<Instant>,
    /// Whether passt will know IPv6.
    has_ipv6: bool,
    /// The guest's recent connections. It repeats its SYN every second until it is answered, and sends all of them at
    /// once if the gateway's address was unknown until then. The passt of Debian 12 resets a connection whose SYN is
    /// repeated before the other side has answered; later versions ignore it.
    attempts: Attempts,
}

/// Starts passt on behalf of a [`Passt`], on a thread that may start processes, and knows how it has ended.
#[derive(Clone)]
pub struct Starter(Arc<Shared>);

/// A process that is terminated when this is dropped, whoever has started it.
pub struct Keeper(Starter);

impl Keeper {
    /// The process's starter.
    pub fn starter(&self) -> &Starter {
        &self.0
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.0.process().end();
    }
}

struct Shared {
    process: Mutex<Process>,
    /// Signaled when passt is needed.
    needed: EventFd,
    /// Whether passt was needed but not started, because the host had no default route. The guest's frames are lost until
    /// it has one.
    lacks_route: SharedFlag,
    /// What a guest that needs passt should know before passt responds.
    announcements: Vec<u8>,
}

impl Shared {
    /// The process. It is locked only while it is being started and after it has ended.
    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Starter {
    /// Whether this is the one with the event `needed`.
    pub fn is(&self, needed: u32) -> bool {
        u32::try_from(self.0.needed.as_raw_fd()) == Ok(needed)
    }

    /// Why passt has closed its socket. Terminates it if it is still running.
    pub fn reason_of_end(&self) -> String {
        self.0.process().reason_of_end()
    }

    /// Starts passt if the guest needs it by now and the host has a network. It takes a few milliseconds to initialize,
    /// during which frames wait in the socket. A failure is reported by the [`Passt`] like a later exit.
    pub fn start_if_needed(&self) {
        self.start_if_needed_with(Routes::of_host);
    }

    fn start_if_needed_with(&self, routes: impl FnOnce() -> Routes) {
        if self.0.needed.read().is_err() {
            return;
        }
        let lacks_route = !routes().is_any();
        if !lacks_route {
            let mut process = self.0.process();
            process.send_early(&self.0.announcements);
            let _ = process.start();
        }
        if !self.0.lacks_route.swap(lacks_route) && lacks_route {
            log::warn!("this host has no default route: the guest has no network until there is one");
        }
    }
}

/// Readable when the guest needs passt.
impl AsRawFd for Starter {
    fn as_raw_fd(&self) -> RawFd {
        self.0.needed.as_raw_fd()
    }
}

/// Prepares passt for one machine with the address `mac`. If ports are published, passt is started, and this waits until
/// they are open. Otherwise its [`Starter`] must start it when the guest sends its first frame that may expect a response.
pub fn open(network: &UserNetwork, mac: MacAddress) -> Result<Passt> {
    ensure!(is_installed(), Missing::Passt);
    let _turn = Turn::take(&network.ports);
    network.ports.iter().try_for_each(ports::check_free)?;
    warn_of_loopback(&network.ports);
    let mut passt = Passt::new(network, mac)?;
    if !network.ports.is_empty() {
        passt.start()?;
        passt.await_service(&network.ports)?;
    } else if !Routes::at_start().is_any() {
        passt.start()?;
        passt.shared.process().await_failure(STARTUP_ERROR_TIMEOUT)?;
    }
    Ok(passt)
}

fn warn_of_loopback(published: &[PortForward]) {
    let is_local =
        |port: &&PortForward| port.protocol == Protocol::Udp && port.host_ip.is_some_and(|ip| ip.is_loopback());
    if let Some(port) = published.iter().find(is_local) {
        // passt maps the source address to the gateway, which is not mapped back because that would expose all of the
        // host's local services.
        log::warn!("replies from UDP port {} may not arrive: passt loses those to loopback addresses", port.host_port);
    }
}

impl Passt {
    /// The back end of a passt process that has not been started.
    fn new(network: &UserNetwork, mac: MacAddress) -> Result<Passt> {
        let (mut ours, theirs) = UnixStream::pair().context("create a socket for passt")?;
        for end in [&ours, &theirs] {
            // If the host's limit is lower, that is sufficient.
            let _ = sys::net::set_send_buffer(end, SOCKET_BUFFER_BYTES);
        }
        if !network.ports.is_empty() {
            ours.write_all(&arp_request(mac)).context("write to passt's socket")?;
        }
        let process = Process::new(PROGRAM, arguments(network, &resolver::of_host()), theirs);
        let needed = event::create().context("create an event for passt")?;
        let shared = Arc::new(Shared {
            process: Mutex::new(process),
            needed,
            lacks_route: SharedFlag::new().context("create a flag for passt")?,
            announcements: announcements(mac),
        });
        Ok(Passt {
            net: StreamNet::new(ours).context("set up passt's socket")?,
            keeper: Some(Keeper(Starter(shared.clone()))),
            shared,
            is_idle: true,
            asked: None,
            has_ipv6: Routes::at_start().ipv6,
            attempts: Attempts::default(),
        })
    }

    /// Takes what terminates passt, which otherwise happens when this is dropped.
    pub fn take_keeper(&mut self) -> Option<Keeper> {
        self.keeper.take()
    }

    /// Starts the process now.
    fn start(&mut self) -> Result<()> {
        self.is_idle = false;
        self.shared.process().start()
    }

    /// Waits until passt has opened `ports`. Fails if it exits first or cannot open one of them.
    fn await_service(&mut self, ports: &[PortForward]) -> Result<()> {
        let started = Instant::now();
        let is_served = loop {
            match self.net.receive() {
                Err(_) => bail!("passt did not start: {}", self.shared.process().end()),
                Ok(true) => break true,
                Ok(false) if started.elapsed() > SERVICE_TIMEOUT => break false,
                Ok(false) => thread::sleep(Duration::from_millis(1)),
            }
            // Without IPv4 on the host it does not reply.
            if started.elapsed() > STARTUP_ERROR_TIMEOUT && ports.iter().all(|port| ports::unopened(port).is_none()) {
                break true;
            }
        };
        if self.net.frame().is_some_and(|(_, frame)| frame.get(12..14) == Some(&ETHERTYPE_ARP)) {
            // The guest did not send this request.
            self.net.consume();
        }
        let unopened = ports.iter().find_map(ports::unopened);
        match unopened {
            None if is_served => Ok(()),
            None => bail!("passt does not respond"),
            Some(number) => bail!("passt cannot publish port {number}: use -p with another port"),
        }
    }

    /// Whether passt has not been started, as far as is known.
    fn is_waiting(&self) -> bool {
        self.is_idle || self.shared.lacks_route.is_set()
    }

    /// Whether passt receives a frame that begins with `front`, which may be the first one that needs it.
    fn takes(&mut self, front: &[u8]) -> bool {
        if !self.is_waiting() {
            return true;
        }
        let may_ask = self.asked.is_none_or(|asked| asked.elapsed() >= RETRY_INTERVAL);
        if !may_ask || !expects_response(front, self.has_ipv6) {
            return false;
        }
        // The first one waits in the socket. Later ones would fill it if there were no route for long.
        let is_first = self.asked.replace(Instant::now()).is_none();
        self.is_idle = false;
        // The counter is far below its maximum, so this neither blocks nor fails.
        let _ = self.shared.needed.write(1);
        is_first
    }

    /// Adds the reason if the error means that passt has exited.
    fn explain(&self, error: io::Error) -> io::Error {
        if !is_end(&error) {
            return error;
        }
        let asked = attendant::end_of_passt(self.shared.needed.as_raw_fd());
        io::Error::new(error.kind(), asked.unwrap_or_else(|| self.shared.process().reason_of_end()))
    }
}

impl NetBackend for Passt {
    fn features(&self) -> u64 {
        self.net.features()
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        self.net.accept(features)
    }

    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        let mut front = [0; FRONT_BYTES];
        let is_inspected = self.is_waiting() || frame.len_bytes() <= ATTEMPT_BYTES_MAX;
        let len = if is_inspected { frame.peek(&mut front) } else { 0 };
        let front = front.get(..len).unwrap_or_default();
        let attempt = Attempt::of(front);
        if !self.takes(front) || attempt.is_some_and(|attempt| self.attempts.has(attempt)) {
            return Ok(());
        }
        self.net.send(header, frame).map_err(|error| self.explain(error))?;
        if let Some(attempt) = attempt {
            self.attempts.note(attempt);
        }
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        self.net.kick().map_err(|error| self.explain(error))
    }

    fn in_flight(&self) -> usize {
        self.net.in_flight()
    }

    fn settle(&mut self) {
        self.net.settle();
    }

    fn receive(&mut self) -> io::Result<bool> {
        self.net.receive().map_err(|error| self.explain(error))
    }

    fn frame(&self) -> Option<(Header, &[u8])> {
        self.net.frame()
    }

    fn consume(&mut self) {
        self.net.consume();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.net.fd()
    }
}

#[cfg(test)]
mod tests;
