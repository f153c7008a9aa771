//! `husk diff`: lists what a machine has changed of its root file system.

use std::io::Read;

use anyhow::{Context, Result, bail};
use clap::Args;
use husk_protocol::LIST_CHANGES;
use husk_protocol::tree::{Entries, Entry};

use super::exit::Exit;
use super::reach::Reached;
use super::transfer;
use crate::foreign;

const EXAMPLES: &str = "\
Examples:
  husk diff web

A line begins with A for what was added, C for what was changed, and D for what was deleted. The machine may be running or stopped.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Diff {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,
}

impl Diff {
    /// Prints a line for each path, in the order of their names.
    pub fn run(self) -> Result<Exit> {
        let machine = Reached::find(&self.machine)?;
        let process = transfer::start(machine.entry(), LIST_CHANGES, "/", false)?;
        let lines = transfer::receive_from(process, |stream| lines(stream));
        let lines = lines.with_context(|| format!("list the changes of {}", machine.asked_for().name()))?;
        super::print(&lines)?;
        Ok(Exit::Success)
    }
}

/// A line for each entry of the guest's stream but the first, which is the root.
fn lines(input: impl Read) -> Result<String> {
    const MAX_BYTES: usize = 256 << 20;
    let mut entries = Entries::new(input, false);
    let (mut lines, mut path, mut is_in_image) = (String::new(), Vec::<String>::new(), false);
    let mut has_begun = false;
    while let Some(entry) = entries.next_entry()? {
        match &entry {
            Entry::InImage => {
                is_in_image = true;
                continue;
            }
            Entry::Opaque => continue,
            Entry::Leave => {
                path.pop();
                continue;
            }
            Entry::File(..) => entries.content(|_| Ok(()))?,
            Entry::Directory(..) | Entry::Link(..) | Entry::Special(..) | Entry::Gone(_) => {}
            _ => bail!("the guest sent invalid data"),
        }
        if has_begun {
            let mark = match (&entry, std::mem::take(&mut is_in_image)) {
                (Entry::Gone(_), _) => 'D',
                (_, true) => 'C',
                (_, false) => 'A',
            };
            path.push(foreign::one_line(&String::from_utf8_lossy(entry.name().unwrap_or_default())).to_string());
            lines.push_str(&format!("{mark} {}\n", path.join("/")));
            if !entry.is_dir() {
                path.pop();
            }
            if lines.len() > MAX_BYTES {
                bail!("there are too many changes to list");
            }
        } else if entry.is_dir() {
            path.push(String::new());
        } else {
            bail!("the guest did not send a directory");
        }
        has_begun = true;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use husk_protocol::tree::{About, Special, Writer};

    use super::*;

    fn stream(entries: &[Entry]) -> Vec<u8> {
        let mut out = Writer::new(Vec::new());
        entries.iter().for_each(|entry| out.say(entry).unwrap());
        out.into_inner()
    }

    #[test]
    fn changes_are_added_changed_or_deleted() {
        let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
        let dir = |name: &[u8]| Entry::Directory(name.to_vec(), about);
        let changes = [
            dir(b"."),
            Entry::InImage,
            dir(b"etc"),
            Entry::Opaque,
            Entry::File(b"a".to_vec(), about, 0),
            Entry::Piece(0),
            Entry::InImage,
            Entry::Link(b"b".to_vec(), b"x".to_vec(), about),
            Entry::Gone(b"group\n".to_vec()),
            Entry::Leave,
            Entry::Special(b"pipe".to_vec(), Special::Pipe, about),
            Entry::Leave,
            Entry::End,
        ];
        let listed = lines(stream(&changes).as_slice()).unwrap();
        assert_eq!(listed.lines().count(), 5, "{listed}");
        assert!(listed.starts_with("C /etc\nA /etc/a\nC /etc/b\nD /etc/group"), "{listed}");
        assert!(listed.ends_with("A /pipe\n"), "{listed}");
        for hostile in
            [vec![Entry::Gone(b"x".to_vec())], vec![dir(b"."), dir(b"../x")], vec![dir(b"."), Entry::Piece(1)]]
        {
            assert!(lines(stream(&hostile).as_slice()).is_err(), "{hostile:?}");
        }
    }
}
