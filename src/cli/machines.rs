//! Helpers for commands that operate on machines given by name.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::exit::Exit;
use crate::request::client::{self, PendingRequest};
use crate::request::{Reply, Request, attach};
use crate::state_dir::record::State;
use crate::state_dir::{self, MachineEntry, StateDir};

/// How long a stop waits by default.
const STOP_TIMEOUT_MS: u64 = 10_000;
const WAIT_INTERVAL: Duration = Duration::from_millis(50);

/// Calls `act` for each machine and prints its name as given. Continues after a failure, which the exit code reports.
pub fn for_each(words: &[String], act: impl Fn(&StateDir, &MachineEntry) -> Result<()>) -> Result<Exit> {
    let state_dir = StateDir::open()?;
    let mut exit = Exit::Success;
    for word in words {
        match state_dir.find(word).and_then(|entry| act(&state_dir, &entry).with_context(|| entry.name().to_owned())) {
            Ok(()) => super::print(&format!("{word}\n"))?,
            Err(error) => exit = super::report(&error),
        }
    }
    Ok(exit)
}

/// The request to stop a machine within `timeout`, or else within the time that it was started with.
pub fn stop_request(entry: &MachineEntry, timeout: Option<Duration>) -> Request {
    let given_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
    let own_ms = || entry.record.as_ref().and_then(|record| record.stop_timeout_ms);
    Request::Stop { timeout_ms: given_ms.or_else(own_ms).unwrap_or(STOP_TIMEOUT_MS) }
}

/// Sends a request that is answered with success or a refusal.
pub fn request(entry: &MachineEntry, request: &Request) -> Result<()> {
    done(client::send(&entry.file(state_dir::CONTROL), request)?)
}

/// The same, calling `wait` from time to time until it is answered.
pub fn request_slowly(entry: &MachineEntry, request: &Request, wait: impl Fn()) -> Result<()> {
    let pending = client::begin(&entry.file(state_dir::CONTROL), request)?;
    while !pending.is_answered_within(WAIT_INTERVAL)? {
        wait();
    }
    done(pending.reply()?.0)
}

fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Refused(why) => bail!(why),
        other => bail!("unexpected response from the machine: {other:?}"),
    }
}

/// Subscribes to a machine's exit; `None` if it is not running.
pub fn watch_exit(entry: &MachineEntry) -> Option<PendingRequest> {
    if !entry.alive {
        return None;
    }
    client::begin(&entry.file(state_dir::CONTROL), &Request::Wait).ok()
}

/// Waits for the exit that `pending` subscribed to, and for the machine's husk process, so that its name is free, and
/// returns the exit code. If husk was killed, that is 137.
pub fn exit_code(entry: &MachineEntry, pending: Option<PendingRequest>) -> Result<u8> {
    const KILLED: u8 = 137;
    let code = pending.map(attach::code);
    let left = entry.await_end()?.map(|entry| entry.state());
    Ok(match (code, left) {
        (Some(Ok(code)), _) | (_, Some(State::Exited { code, .. })) => code,
        (_, Some(State::Created | State::Suspended { .. })) => 0,
        _ => KILLED,
    })
}
