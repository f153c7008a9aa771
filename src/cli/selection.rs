//! Which machines a command is for: those that are named or, in podman's words, all of them, or those whose IDs are in files.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::reach;
use crate::state_dir::{MachineEntry, StateDir};

// The arguments of commands for several machines.
#[derive(Debug, Args)]
pub(super) struct Selection {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required_unless_present_any = ["all", "cidfile"])]
    machines: Vec<String>,

    /// All machines that it makes sense for
    #[arg(short, long, conflicts_with_all = ["machines", "cidfile"])]
    all: bool,

    /// Read the ID of a machine from a file, as `husk run --cidfile` writes it; can be repeated
    #[arg(long, value_name = "FILE")]
    cidfile: Vec<PathBuf>,

    /// Do not fail if a machine does not exist
    #[arg(short, long)]
    ignore: bool,
}

impl Selection {
    /// Their names or IDs, each as it was given. `suits` says which are meant by all.
    pub fn words(self, suits: impl Fn(&MachineEntry) -> bool) -> Result<Vec<String>> {
        let state_dir = StateDir::open()?;
        if self.all {
            return Ok(reach::machines(&state_dir)?.into_iter().filter(suits).map(|entry| entry.id).collect());
        }
        let mut words = self.machines;
        for path in &self.cidfile {
            match fs::read_to_string(path) {
                Ok(id) => words.push(id.trim().to_owned()),
                Err(_) if self.ignore => {}
                Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
            }
        }
        if self.ignore {
            // What cannot be found for another reason is reported where it is used.
            words.retain(|word| state_dir.has(word).unwrap_or(true));
        }
        Ok(words)
    }
}
