//! From the names that a command is given to requests to those machines, and from their answers to an exit code.

use anyhow::{Context, Result, bail};

use super::exit::Exit;
use crate::request::client::{self, Asked};
use crate::request::{Reply, Request, attach};
use crate::roster::record::State;
use crate::roster::{self, Entry, Roster};

/// Does `act` to each machine and prints its word; goes on where one fails, and tells so in the end.
pub fn each(words: &[String], act: impl Fn(&Roster, &Entry) -> Result<()>) -> Result<Exit> {
    let roster = Roster::open()?;
    let mut exit = Exit::Success;
    for word in words {
        match roster.find(word).and_then(|entry| act(&roster, &entry).with_context(|| entry.name().to_owned())) {
            Ok(()) => super::print(&format!("{word}\n"))?,
            Err(error) => exit = super::report(&error),
        }
    }
    Ok(exit)
}

/// Asks a machine for something that it does or does not do.
pub fn done(entry: &Entry, request: &Request) -> Result<()> {
    match client::ask(&entry.file(roster::CONTROL), request)? {
        Reply::Done => Ok(()),
        Reply::Refused(why) => bail!(why),
        other => bail!("unexpected response from the machine: {other:?}"),
    }
}

/// A word from a machine when it will have ended; nothing where it has ended already.
pub fn end(entry: &Entry) -> Option<Asked> {
    if !entry.alive {
        return None;
    }
    client::begin(&entry.file(roster::CONTROL), &Request::Wait).ok()
}

/// Waits for the end that `asked` is to tell of, and for the machine's husk, so that its name is free; returns the exit code. A
/// machine whose husk is killed ends as if its own process had been.
pub fn code(entry: &Entry, asked: Option<Asked>) -> Result<u8> {
    const KILLED: u8 = 137;
    let told = asked.map(attach::code);
    let left = entry.await_end()?.map(|entry| entry.state());
    Ok(match (told, left) {
        (Some(Ok(code)), _) | (_, Some(State::Exited { code, .. })) => code,
        _ => KILLED,
    })
}
