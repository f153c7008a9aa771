//! Handles requests to a machine, on its main thread, between events.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::WindowSize;
use rustix::time::{ClockId, clock_gettime};

use super::control::Supervisor;
use super::endpoint::ControlEndpoint;
use crate::config::Rate;
use crate::console::input::Input;
use crate::exit_latch::ExitReason;
use crate::guest::signal;
use crate::monitor::BEING_SAVED;
use crate::request::server::Caller;
use crate::request::{Limit, Reply, Request, Stats, Update};
use crate::state_dir::events::Event;
use crate::state_dir::record::{State, now_ms};

/// Returns `rate` with the specified limits replaced and their bursts reset to the defaults, or `None` if none is
/// specified.
fn changed(rate: Rate, bytes: Option<Limit>, ops: Option<Limit>) -> Result<Option<Rate>> {
    if bytes.or(ops).is_none() {
        return Ok(None);
    }
    let mut changed = rate;
    let in_force = |limit| match limit {
        Limit::Lifted => None,
        Limit::PerSecond(amount) => Some(amount),
    };
    if let Some(limit) = bytes {
        (changed.bytes_per_second, changed.burst_bytes) = (in_force(limit), None);
    }
    if let Some(limit) = ops {
        (changed.ops_per_second, changed.burst_ops) = (in_force(limit), None);
    }
    ensure!(changed.makes_sense(), "a limit must be 1 or more");
    Ok(Some(changed))
}

/// The recipient of requests: a running machine, or one that is not running.
pub(super) trait Recipient {
    /// The endpoint that receives the requests.
    fn endpoint(&mut self) -> &mut ControlEndpoint;

    /// Asks the guest to stop. The request and its deadline have already been recorded.
    fn stop(&mut self) -> Result<()>;

    /// Sends the guest's process a signal.
    fn kill(&mut self, signal: u8) -> Result<()>;

    /// Handles any other request. Returns the reply, unless the connection was put to another use.
    fn serve(&mut self, caller: Caller, request: Request) -> Result<Option<Reply>>;
}

/// Answers the pending requests.
pub(super) fn answer(recipient: &mut impl Recipient) {
    for (caller, request) in recipient.endpoint().server.requests() {
        let reply = match request {
            Request::Wait => {
                recipient.endpoint().server.answer_at_end(caller);
                continue;
            }
            Request::Stop { timeout_ms } => {
                recipient.endpoint().request_end_within(Duration::from_millis(timeout_ms));
                recipient.endpoint().note_stop();
                recipient.stop().map(|()| Some(Reply::Done))
            }
            Request::Kill { signal } => recipient.kill(signal).map(|()| {
                recipient.endpoint().note_signal(signal);
                Some(Reply::Done)
            }),
            other => recipient.serve(caller, other),
        };
        let server = &mut recipient.endpoint().server;
        match reply {
            Ok(Some(reply)) => server.answer(caller, &reply),
            Ok(None) => {}
            Err(error) => server.answer(caller, &Reply::Refused(format!("{error:#}"))),
        }
    }
}

/// A machine that has ended or has not been restarted yet. Only a stop can be requested.
pub(super) struct NotRunning<'a> {
    pub endpoint: &'a mut ControlEndpoint,
    /// Why other requests are refused.
    pub why: &'a str,
    /// Whether an immediate end was requested.
    pub at_once: bool,
}

impl Recipient for NotRunning<'_> {
    fn endpoint(&mut self) -> &mut ControlEndpoint {
        self.endpoint
    }

    fn stop(&mut self) -> Result<()> {
        Ok(())
    }

    fn kill(&mut self, _signal: u8) -> Result<()> {
        (self.endpoint.end_requested, self.at_once) = (true, true);
        Ok(())
    }

    fn serve(&mut self, _caller: Caller, _request: Request) -> Result<Option<Reply>> {
        bail!("{}", self.why)
    }
}

impl Recipient for Supervisor<'_> {
    fn endpoint(&mut self) -> &mut ControlEndpoint {
        self.endpoint
    }

    fn stop(&mut self) -> Result<()> {
        if matches!(self.endpoint.record.state, State::Paused { .. }) {
            ensure!(!self.is_held(), BEING_SAVED);
            self.unpause()?;
        }
        match &mut self.session {
            Some(session) if session.has_started() => session.send_signal(self.endpoint.stop_signal()),
            // There is no process in the guest to send a signal to.
            Some(_) => self.monitor.exit_latch().declare(ExitReason::Killed(libc::SIGTERM)),
            None => self.press_power_button(),
        }
        Ok(())
    }

    fn kill(&mut self, signal: u8) -> Result<()> {
        let terminates = signal::is_termination(i32::from(signal));
        if i32::from(signal) == libc::SIGKILL {
            self.endpoint.end_requested = true;
            self.monitor.exit_latch().declare(ExitReason::Killed(libc::SIGKILL));
            return Ok(());
        }
        ensure!(
            !matches!(self.endpoint.record.state, State::Paused { .. }),
            "the machine is paused: run `husk unpause` first"
        );
        match &mut self.session {
            Some(session) if session.has_started() => {
                self.endpoint.end_requested |= terminates;
                session.send_signal(signal);
            }
            Some(session) if session.is_created() && terminates => {
                self.endpoint.end_requested = true;
                self.monitor.exit_latch().declare(ExitReason::Killed(signal.into()));
            }
            Some(_) => bail!("the machine's process has not started yet: try again"),
            None if terminates => {
                self.endpoint.end_requested = true;
                self.press_power_button();
            }
            None => {
                bail!("the machine runs its own init: only KILL and termination signals are supported")
            }
        }
        Ok(())
    }

    fn serve(&mut self, caller: Caller, request: Request) -> Result<Option<Reply>> {
        let changes_machine = matches!(request, Request::Pause | Request::Unpause | Request::Update(_));
        ensure!(!(changes_machine && self.is_held()), BEING_SAVED);
        match request {
            Request::Pause => self.pause()?,
            Request::Unpause => self.unpause()?,
            Request::Stats => return self.stats().map(|stats| Some(Reply::Stats(stats))),
            Request::Snapshot { path, options } => {
                self.snapshot(caller, Path::new(OsStr::from_bytes(&path)), options)?;
                return Ok(None);
            }
            Request::Update(update) => self.update(update)?,
            Request::Go => {
                self.go(caller)?;
                return Ok(None);
            }
            Request::Attach => {
                self.attach(caller)?;
                return Ok(None);
            }
            Request::Feed => {
                self.take_input(caller)?;
                return Ok(None);
            }
            Request::Resize { rows, columns } => {
                if let Some(session) = &mut self.session {
                    session.resize_to(WindowSize { rows, columns });
                }
            }
            Request::Rename { name } => {
                let earlier = Event::of(&self.endpoint.record, "rename");
                self.endpoint.dir.rename(&mut self.endpoint.record, &name)?;
                self.endpoint.note([earlier.renamed(&name)]);
            }
            Request::Stop { .. } | Request::Kill { .. } | Request::Wait => unreachable!("answered before"),
        }
        Ok(Some(Reply::Done))
    }
}

impl Supervisor<'_> {
    /// Executes the program of a process that waits in its container. The caller is answered when that is known.
    fn go(&mut self, caller: Caller) -> Result<()> {
        let session = self.session.as_mut().filter(|session| session.is_created() && !session.has_started());
        let session = session.filter(|_| self.starter.is_none());
        session.context("the container has been started already")?.go();
        self.starter = Some(caller);
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        match self.endpoint.record.state {
            State::Running { .. } => {}
            State::Paused { .. } => bail!("the machine is already paused"),
            _ => bail!("the machine is still starting: try again"),
        }
        self.monitor.pause()?;
        self.prober.iter().for_each(|prober| prober.set_paused(true));
        self.endpoint.note([Event::of(&self.endpoint.record, "pause")]);
        self.endpoint.enter(State::Paused { since_ms: now_ms() })
    }

    fn unpause(&mut self) -> Result<()> {
        ensure!(matches!(self.endpoint.record.state, State::Paused { .. }), "the machine is not paused");
        self.resume_guest()?;
        self.prober.iter().for_each(|prober| prober.set_paused(false));
        self.endpoint.note([Event::of(&self.endpoint.record, "unpause")]);
        self.endpoint.enter(State::Running { since_ms: now_ms() })
    }

    /// Connects the machine's streams to the caller.
    fn attach(&mut self, caller: Caller) -> Result<()> {
        let Some(hub) = self.endpoint.hub().filter(|_| self.endpoint.is_detached()).cloned() else {
            bail!("the machine runs in the foreground: its streams are on the terminal it was started from");
        };
        let Some(stream) = self.endpoint.server.hand_over(caller) else { return Ok(()) };
        hub.attach(stream.try_clone()?)?;
        match &mut self.session {
            Some(session) => {
                stream.set_nonblocking(false)?;
                session.attach_input(stream, false)
            }
            None => {
                if let Some(mut earlier) = self.input.take() {
                    earlier.unwatch(&self.epoll)?;
                    self.earlier_inputs.push(earlier);
                }
                self.input = Some(Input::from_file(OwnedFd::from(stream).into()));
                self.feed()
            }
        }
    }

    /// Makes what the caller sends the whole input of the machine's process.
    fn take_input(&mut self, caller: Caller) -> Result<()> {
        let session =
            self.session.as_mut().context("the machine runs its own init, which has a console: use husk attach")?;
        let Some(stream) = self.endpoint.server.hand_over(caller) else { return Ok(()) };
        stream.set_nonblocking(false)?;
        session.attach_input(stream, true)
    }

    /// Changes the machine's limits and its record. The first limit that cannot be set stops the update; those before
    /// it in the list remain changed.
    fn update(&mut self, update: Update) -> Result<()> {
        let changed = self.change(update);
        let written = self.endpoint.write_record();
        changed.and(written)
    }

    fn change(&mut self, update: Update) -> Result<()> {
        let config = &mut self.endpoint.record.config;
        if let Some(memory_mib) = update.memory_mib {
            ensure!(config.balloon, "the machine was started with --no-balloon: its memory cannot be changed");
            self.monitor.set_memory_target(memory_mib)?;
            config.memory_target_mib = Some(memory_mib);
        }
        if update.millicpus.is_some() || update.cpu_shares.is_some() {
            let all = config.cpus.saturating_mul(1000);
            let cgroup_limits = self.monitor.cgroup_limits();
            let before = cgroup_limits.limits();
            let millicpus = match update.millicpus {
                None => before.cpu_millicpus,
                Some(millicpus) if millicpus > all => {
                    bail!("the machine has {} vCPUs and cannot use more: start it with more --cpus", config.cpus)
                }
                Some(millicpus) => Some(millicpus).filter(|millicpus| *millicpus < all),
            };
            cgroup_limits.set_cpu(millicpus, update.cpu_shares.or(before.cpu_shares))?;
            (config.cpu_limit_millicpus, config.cpu_shares) = (millicpus, update.cpu_shares.or(config.cpu_shares));
        }
        for (index, disk) in config.disks.iter_mut().enumerate() {
            if let Some(rate) = changed(disk.rate, update.disk_bytes_per_second, update.disk_ops_per_second)? {
                self.monitor.set_disk_rate(index, rate)?;
                disk.rate = rate;
            }
        }
        for (index, network) in config.networks.iter_mut().enumerate() {
            let (bytes, packets) = (update.network_bytes_per_second, update.network_packets_per_second);
            if let Some(rate) = changed(network.rate, bytes, packets)? {
                self.monitor.set_network_rate(index, rate)?;
                network.rate = rate;
            }
        }
        if let Some(up) = update.link_up {
            ensure!(!config.networks.is_empty(), "the machine has no network");
            self.monitor.set_links(up)?;
        }
        Ok(())
    }

    /// The machine's resource usage on the host: of its monitor and of this process.
    fn stats(&mut self) -> Result<Stats> {
        let usage = self.monitor.usage()?;
        let memory = self.monitor.memory_use(&usage).context("read the memory usage of the machine")?;
        let memory_mib = self.endpoint.record.config.memory_mib;
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let own = Duration::new(own.tv_sec.unsigned_abs(), u32::try_from(own.tv_nsec).unwrap_or(0));
        Ok(Stats {
            cpu_us: usage.cpu.saturating_add(own).as_micros() as u64,
            elapsed_us: self.endpoint.elapsed().as_micros() as u64,
            guest_memory_bytes: memory.guest.rss_bytes,
            own_memory_bytes: memory.husk.pss_bytes,
            memory_limit_bytes: usage.target_mib.unwrap_or(memory_mib).min(memory_mib) << 20,
            block_read_bytes: usage.disk_bytes.0,
            block_written_bytes: usage.disk_bytes.1,
            net_received_bytes: usage.network_bytes.0,
            net_sent_bytes: usage.network_bytes.1,
            net_vhost_interfaces: usage.vhost_interfaces,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_set_removed_or_kept() {
        let rate = Rate { bytes_per_second: Some(7), burst_bytes: Some(9), ops_per_second: Some(5), burst_ops: None };
        assert_eq!(changed(rate, None, None).unwrap(), None);
        let lifted = Rate { bytes_per_second: None, burst_bytes: None, ..rate };
        assert_eq!(changed(rate, Some(Limit::Lifted), None).unwrap(), Some(lifted));
        let other = Rate { bytes_per_second: Some(8), burst_bytes: None, ops_per_second: None, burst_ops: None };
        let changes = (Some(Limit::PerSecond(8)), Some(Limit::Lifted));
        assert_eq!(changed(rate, changes.0, changes.1).unwrap(), Some(other));
        assert!(changed(rate, Some(Limit::PerSecond(0)), None).is_err());
    }
}
