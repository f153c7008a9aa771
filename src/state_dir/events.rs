//! What happens to a user's machines, images and networks: lines of JSON in a file of the state directory, one an event. There
//! is no daemon: each process appends what it does, with one write. When the file is full, it becomes the old one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::StateDir;
use super::record::Record;
use crate::sys::private_file;

const FILE: &str = "events";
const OLD_FILE: &str = "events.old";
/// The size at which a file becomes the old one.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// The maximum length of an event's line.
const LINE_MAX_BYTES: usize = 64 << 10;

/// An event, as Docker describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `container` for a machine, `image` or `network`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// What happened, such as `start`.
    #[serde(rename = "Action")]
    pub action: String,
    /// What it happened to.
    #[serde(rename = "Actor")]
    pub actor: Actor,
    /// When, in nanoseconds since 1970.
    #[serde(rename = "timeNano")]
    pub time_ns: u64,
}

/// What an event happened to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Its ID.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name and more.
    #[serde(rename = "Attributes")]
    pub attributes: BTreeMap<String, String>,
}

impl Event {
    /// An event now.
    pub fn new(kind: &str, action: impl Into<String>, id: &str) -> Event {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Event {
            kind: kind.to_owned(),
            action: action.into(),
            actor: Actor { id: id.to_owned(), attributes: BTreeMap::new() },
            time_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// An event of the machine with this record.
    pub fn of(record: &Record, action: impl Into<String>) -> Event {
        let name = record.name.as_ref().unwrap_or(&record.id);
        let event = Event::new("container", action, &record.id);
        let labeled = record.labels.iter().fold(event, |event, (label, value)| event.with(label, value));
        labeled.with("image", &record.image).with("name", name)
    }

    /// The event of a machine with its earlier name that is now called `name`.
    pub fn renamed(self, name: &str) -> Event {
        let earlier = self.actor.attributes.get("name").cloned().unwrap_or_default();
        self.with("oldName", earlier).with("name", name)
    }

    /// Adds an attribute.
    pub fn with(mut self, name: &str, value: impl ToString) -> Event {
        self.actor.attributes.insert(name.to_owned(), value.to_string());
        self
    }
}

impl StateDir {
    /// Notes events. That they cannot be noted, for example on a full disk, is nobody's failure.
    pub fn note(&self, events: &[Event]) {
        let mut lines = Vec::new();
        for event in events {
            let _ = serde_json::to_writer(&mut lines, event);
            lines.push(b'\n');
        }
        if let Err(error) = self.append(&lines) {
            log::info!("note an event: {error}");
        }
    }

    fn append(&self, lines: &[u8]) -> std::io::Result<()> {
        let path = self.events_file(FILE);
        let mut file = private_file().append(true).create(true).open(&path)?;
        file.write_all(lines)?;
        // One process renames the file; for another one that has it open, the lock is taken or the path leads elsewhere.
        let opened = file.metadata()?;
        let is_current = || fs::metadata(&path).is_ok_and(|current| current.ino() == opened.ino());
        if opened.len() >= FILE_MAX_BYTES && file.try_lock().is_ok() && is_current() {
            fs::rename(&path, self.events_file(OLD_FILE))?;
        }
        Ok(())
    }

    fn events_file(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    /// The events so far, followed by those to come.
    pub fn events(&self) -> Events {
        let open = |name| File::open(self.events_file(name)).ok().map(BufReader::new);
        Events {
            dir: self.clone(),
            files: [open(OLD_FILE), open(FILE)].into_iter().flatten().collect(),
            line: Vec::new(),
        }
    }
}

/// Reads events in the order in which they were noted.
pub struct Events {
    dir: StateDir,
    /// Those that are not read to their end, oldest first. The last one may grow.
    files: Vec<BufReader<File>>,
    /// The beginning of a line whose rest is not written yet.
    line: Vec<u8>,
}

impl Iterator for Events {
    type Item = Event;

    /// The next event; `None` if there is none yet. Lines that are no events are skipped.
    fn next(&mut self) -> Option<Event> {
        loop {
            let Some(file) = self.files.first_mut() else {
                self.find_new_file().then_some(())?;
                continue;
            };
            let room = LINE_MAX_BYTES.saturating_sub(self.line.len()).max(1);
            let read_bytes = file.take(room as u64).read_until(b'\n', &mut self.line).unwrap_or(0);
            if self.line.ends_with(b"\n") || self.line.len() >= LINE_MAX_BYTES {
                let line = std::mem::take(&mut self.line);
                if let Ok(event) = serde_json::from_slice(&line) {
                    return Some(event);
                }
            } else if read_bytes == 0 && self.files.len() > 1 {
                self.files.remove(0);
                self.line.clear();
            } else if read_bytes == 0 && !self.find_new_file() {
                return None;
            }
        }
    }
}

impl Events {
    /// Appends the file that others write to, unless it is known. Returns whether it was not.
    fn find_new_file(&mut self) -> bool {
        let Ok(file) = File::open(self.dir.events_file(FILE)) else { return false };
        let inode = |file: &File| file.metadata().map_or(0, |file| file.ino());
        let is_new = self.files.last().is_none_or(|known| inode(known.get_ref()) != inode(&file));
        if is_new {
            self.files.push(BufReader::new(file));
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::state_dir;
    use super::*;

    #[test]
    fn events_are_read_in_order_while_they_are_noted() {
        let (_temporary, dir) = state_dir();
        let mut events = dir.events();
        assert_eq!(events.next(), None);
        let event = |action: &str| Event::new("container", action, "0123").with("name", "web");
        let (created, started) = (event("create"), event("start"));
        dir.note(&[created.clone(), started.clone()]);
        assert_eq!([events.next(), events.next(), events.next()], [Some(created.clone()), Some(started), None]);
        let died = event("die").with("exitCode", 3);
        dir.note(std::slice::from_ref(&died));
        assert_eq!((events.next(), events.next()), (Some(died), None));
        assert_eq!(dir.events().next(), Some(created));
        let json = serde_json::to_string(&event("die")).unwrap();
        assert!(
            json.starts_with(r#"{"Type":"container","Action":"die","Actor":{"ID":"0123","Attributes":{"#),
            "{json}"
        );
    }

    #[test]
    fn a_reader_misses_no_event_when_the_file_is_replaced() {
        let (_temporary, dir) = state_dir();
        let mut events = dir.events();
        let word = "x".repeat(1000);
        let mut expected = 0;
        for number in 0..3000_u32 {
            dir.note(&[Event::new("image", "pull", &number.to_string()).with("name", &word)]);
            if number % 700 == 0 {
                for event in events.by_ref() {
                    assert_eq!(event.actor.id, expected.to_string());
                    expected += 1;
                }
            }
        }
        let left: Vec<Event> = events.collect();
        assert_eq!(left.last().unwrap().actor.id, "2999");
        let size = |name| fs::metadata(dir.events_file(name)).map_or(0, |file| file.len());
        assert!(size(OLD_FILE) > 0 && size(FILE).max(size(OLD_FILE)) < FILE_MAX_BYTES + LINE_MAX_BYTES as u64);
    }

    #[test]
    fn what_is_no_event_is_skipped() {
        let (_temporary, dir) = state_dir();
        fs::write(dir.events_file(FILE), b"{}\n\xff\n[1]\n").unwrap();
        let event = Event::new("image", "tag", "1");
        dir.note(std::slice::from_ref(&event));
        dir.append(&vec![b'x'; LINE_MAX_BYTES + 5]).unwrap();
        dir.append(b"\n").unwrap();
        dir.note(std::slice::from_ref(&event));
        assert_eq!(dir.events().count(), 2);
    }
}
