//! `husk cp`: files and folders into a machine that runs, and out of it.

use std::io::{self, BufReader, BufWriter, IsTerminal, Read};
use std::net::Shutdown;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::tree::{self, Copied, Trust};
use husk_protocol::{
    COPY_FROM, COPY_FROM_AS_TAR, COPY_TO, COPY_TO_KEEPING_OWNERS, INIT_PROGRAM, Process, Role, ToHost,
};
use indicatif::HumanBytes;

use super::exec;
use super::exit::Exit;
use crate::guest::exec as guest;
use crate::image::{Progress, tar_copy};
use crate::roster::{self, Roster};
use crate::sandbox;

const EXAMPLES: &str = "\
Examples:
  husk cp web:/var/log/nginx .
  husk cp site web:/srv             (the folder itself)
  husk cp site/. web:/srv           (what is in it)
  husk cp --archive web:/home backup
  husk cp web:/var/log - | tar t    (as a tar archive)
  tar c . | husk cp - web:/srv      (what is in one)

A path without a machine is one of this host's; one of the two paths has a machine. Devices, pipes and sockets are left out.";

/// The flags of `husk cp`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Cp {
    /// What to copy, or - for the tar archive on standard input
    #[arg(value_name = "[MACHINE:]PATH")]
    from: String,

    /// The folder to put it in, or its new name, or - for a tar archive on standard output
    #[arg(value_name = "[MACHINE:]PATH")]
    to: String,

    /// Keep owners, and bits that make a program run as its owner
    #[arg(short, long)]
    archive: bool,
}

impl Cp {
    /// Copies, and prints how much it was where somebody looks on.
    pub fn run(self) -> Result<Exit> {
        let copied = match (machine(&self.from), machine(&self.to)) {
            (Some((name, path)), None) if self.to == "-" => fetch_as_tar(name, path)?,
            (Some((name, path)), None) => self.fetch(name, path)?,
            (None, Some((name, path))) => self.bring(name, path)?,
            (None, None) => bail!("neither path has a machine: type MACHINE:PATH for one of them"),
            (Some(_), Some(_)) => bail!("both paths have a machine: copy to a folder of this host's in between"),
        };
        copied.skipped.iter().for_each(|path| {
            log::warn!("left out {}: no file, folder or link", path.display());
        });
        log::info!("copied {} files, links and folders, {}", copied.entries, HumanBytes(copied.bytes));
        Ok(Exit::Success)
    }

    fn fetch(&self, name: &str, path: &str) -> Result<Copied> {
        let mut process = start(name, COPY_FROM, path, false)?;
        let stream = process.take(Role::Stdout)?;
        let errors = collect(&mut process)?;
        let bar = Progress::on_terminal().count("copy");
        let to = Path::new(&self.to);
        // Of the guest, further names for files of this host's are not taken.
        let trust = Trust { owners: self.archive, names: false };
        let received = tree::receive(&mut BufReader::new(stream), to, trust, &mut |bytes| bar.set(bytes));
        drop(bar);
        let copied = received.with_context(|| format!("copy {path} from {name}"))?;
        conclude(process, errors).with_context(|| format!("copy {path} from {name}"))?;
        Ok(copied)
    }

    fn bring(&self, name: &str, path: &str) -> Result<Copied> {
        let from = PathBuf::from(&self.from);
        let as_tar = self.from == "-";
        ensure!(!as_tar || !io::stdin().is_terminal(), "standard input is a terminal: no archive comes from there");
        ensure!(as_tar || from.symlink_metadata().is_ok(), "{}: No such file or directory", from.display());
        let word = if self.archive { COPY_TO_KEEPING_OWNERS } else { COPY_TO };
        let mut process = start(name, word, path, true)?;
        let stream = process.take(Role::Stdin)?;
        // What it says otherwise is for nobody.
        let _output = process.take(Role::Stdout)?;
        let errors = collect(&mut process)?;
        let bar = Progress::on_terminal().count("copy");
        let mut out = BufWriter::new(&stream);
        let sent = match as_tar {
            true => tar_copy::send(BufReader::new(io::stdin().lock()), &mut out, &mut |bytes| bar.set(bytes)),
            false => tree::send(&from, &mut out, &mut |bytes| bar.set(bytes)).map_err(anyhow::Error::from),
        };
        drop(out);
        let _ = stream.shutdown(Shutdown::Write);
        drop(bar);
        // Where the other side has given up, it knows why.
        let ended = conclude(process, errors).with_context(|| format!("copy to {path} in {name}"));
        ended.and_then(|()| sent.with_context(|| format!("copy {}", from.display())))
    }
}

/// Prints what is at `path` as an archive, which the guest makes.
fn fetch_as_tar(name: &str, path: &str) -> Result<Copied> {
    ensure!(!io::stdout().is_terminal(), "standard output is a terminal: send the archive to a file or a pipe");
    let mut process = start(name, COPY_FROM_AS_TAR, path, false)?;
    let mut stream = process.take(Role::Stdout)?;
    let errors = collect(&mut process)?;
    let copied = io::copy(&mut stream, &mut io::stdout().lock());
    // Whoever reads no further has had enough.
    if matches!(&copied, Err(error) if error.kind() == io::ErrorKind::BrokenPipe) {
        return Ok(Copied::default());
    }
    let bytes = copied.context("write to standard output")?;
    conclude(process, errors).with_context(|| format!("copy {path} from {name}"))?;
    Ok(Copied { bytes, ..Copied::default() })
}

/// The machine and the path in `MACHINE:PATH`. What begins with a path's signs is one of this host's.
fn machine(text: &str) -> Option<(&str, &str)> {
    let (name, path) = text.split_once(':')?;
    roster::names::check(name).is_ok().then_some((name, path))
}

fn start(name: &str, word: &str, path: &str, stdin: bool) -> Result<guest::Connections> {
    let entry = Roster::open()?.find(name)?;
    exec::inherited(&entry)?;
    ensure!(!path.is_empty(), "there is no path behind {name}:");
    let args = [INIT_PROGRAM, word, path].map(|word| word.as_bytes().to_vec()).to_vec();
    let process = Process { args, user: "0:0".into(), stdin, ..Process::default() };
    guest::start(&entry.file(roster::VSOCK), &process)
}

type Errors = std::thread::JoinHandle<String>;

/// Collects what the other side says of its troubles, which are few.
fn collect(process: &mut guest::Connections) -> Result<Errors> {
    const MAX_BYTES: u64 = 64 << 10;
    let stream = process.take(Role::Stderr)?;
    let read = move || {
        let mut bytes = Vec::new();
        let _ = stream.take(MAX_BYTES).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    sandbox::spawn("stderr", read).context("start a thread")
}

/// Waits for the other side's end, and fails where that was not a good one.
fn conclude(process: guest::Connections, errors: Errors) -> Result<()> {
    let end = process.end()?;
    let said = errors.join().unwrap_or_default();
    match end {
        ToHost::Exited(0) => {
            said.lines().for_each(|line| log::warn!("{line}"));
            Ok(())
        }
        ToHost::Failed { message, .. } => bail!(message),
        _ if said.trim().is_empty() => bail!("the guest could not do it"),
        _ => bail!(said.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_stands_before_a_colon() {
        assert_eq!(machine("web:/etc"), Some(("web", "/etc")));
        assert_eq!(machine("web:a:b"), Some(("web", "a:b")));
        for text in ["/etc", "./a:b", "../a:b", "/a:b", ":x", "file"] {
            assert_eq!(machine(text), None, "{text}");
        }
    }
}
