//! The guest side of `husk cp`, `export`, `diff` and `commit`. It is part of init's own program, run as the process of a session, because every
//! machine has that and possibly nothing else.

use std::ffi::OsString;
use std::io::{self, BufReader, BufWriter};
use std::path::PathBuf;

use husk_protocol::tree::{self, Copied, Terms};
use husk_protocol::{
    COPY_CHANGES, COPY_FROM, COPY_FROM_BEHIND_LINK, COPY_ROOT, COPY_TO, COPY_TO_KEEPING_OWNERS, IDLE, LIST_CHANGES,
};

use crate::root::{IMAGE_FD, UPPER_FD};

const CODE_USAGE: i32 = 2;

/// Executes the command in `words` with standard input or output. Returns the exit code.
pub fn run(mut words: impl Iterator<Item = OsString>) -> i32 {
    let (Some(what), Some(path)) = (words.next(), words.next().map(PathBuf::from)) else { return refuse() };
    let is_sent = !matches!(what.to_str(), Some(COPY_TO | COPY_TO_KEEPING_OWNERS));
    let copied = match what.to_str() {
        Some(word @ (COPY_FROM | COPY_FROM_BEHIND_LINK)) => {
            let follow = word == COPY_FROM_BEHIND_LINK;
            tree::send(&path, follow, &mut BufWriter::new(io::stdout().lock()), &mut |_| {})
        }
        Some(word @ (COPY_TO | COPY_TO_KEEPING_OWNERS)) => {
            // The sender is the host.
            let terms = Terms { owners: word == COPY_TO_KEEPING_OWNERS, trusted: true, ..Terms::default() };
            tree::receive(&mut BufReader::new(io::stdin().lock()), &path, terms, &mut |_| {})
        }
        Some(COPY_ROOT) => tree::send_root(&path, &mut BufWriter::new(io::stdout().lock())),
        Some(word @ (COPY_CHANGES | LIST_CHANGES)) => {
            // PID 1 has them open, and nothing else leads there.
            let [upper, image] = [UPPER_FD, IMAGE_FD].map(|fd| PathBuf::from(format!("/proc/1/fd/{fd}")));
            tree::send_changes(&upper, &image, word == COPY_CHANGES, &mut BufWriter::new(io::stdout().lock()))
        }
        Some(IDLE) => loop {
            std::thread::park();
        },
        _ => return refuse(),
    };
    match copied {
        Ok(Copied { skipped, .. }) => {
            skipped.iter().for_each(|what| eprintln!("skipped {what}"));
            0
        }
        // The receiver is notified through the stream.
        Err(_) if is_sent => 1,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

fn refuse() -> i32 {
    eprintln!("husk-init: this program runs as PID 1 of a machine, and not by itself");
    CODE_USAGE
}
