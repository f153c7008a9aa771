//! `husk export`: writes the root file system of a machine as a tar archive.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use husk_protocol::COPY_ROOT;

use super::exit::Exit;
use super::reach::Reached;
use super::transfer;
use crate::image::tar_stream::{self, Content};

const EXAMPLES: &str = "\
Examples:
  husk export web >web.tar
  husk export -o web.tar web

The machine may be running or stopped. What is mounted in it, such as volumes, is left out.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Export {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Export {
    /// Writes the archive.
    pub fn run(self) -> Result<Exit> {
        let mut out: Box<dyn Write> = match &self.output {
            Some(path) => Box::new(File::create(path).with_context(|| format!("create {}", path.display()))?),
            None => {
                ensure!(
                    !io::stdout().is_terminal(),
                    "refusing to write a tar archive to a terminal: use -o, or redirect standard output"
                );
                Box::new(io::stdout().lock())
            }
        };
        let machine = Reached::find(&self.machine)?;
        archive(&machine, COPY_ROOT, Content::Root, &mut out)?;
        Ok(Exit::Success)
    }
}

/// Writes an archive of what init's program sends for `word`.
pub(super) fn archive(machine: &Reached, word: &str, content: Content, out: &mut impl Write) -> Result<()> {
    let process = transfer::start(machine.entry(), word, "/", false)?;
    let mut out = BufWriter::new(out);
    let copied = transfer::receive_from(process, |stream| tar_stream::receive(stream, b".", content, &mut out));
    let copied = copied.with_context(|| format!("read the files of {}", machine.asked_for().name()))?;
    copied.skipped.iter().for_each(|what| log::warn!("skipped {what}"));
    out.flush().context("write the archive")
}
