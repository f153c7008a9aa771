//! Flags of a process in a machine, shared by `husk run` and `husk exec`.

use std::ffi::OsString;
use std::io::{IsTerminal, stdin};
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::argv;
use crate::guest::process::{self, Overrides};
use crate::resources::text;

// Streams, variables, place and user.
#[derive(Debug, Args)]
pub(super) struct ProcessFlags {
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,

    /// Allocate a pseudo-TTY
    #[arg(short, long)]
    pub tty: bool,

    /// Set an environment variable; NAME alone passes on the value from the host
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,

    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,

    /// Working directory inside the machine
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<OsString>,

    /// Username or UID, and optionally group name or GID
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

impl ProcessFlags {
    /// The overrides from the flags, to run `command`. Reads environment files; consumes the flags.
    pub fn overrides(&mut self, command: Vec<OsString>) -> Result<Overrides> {
        let mut env = Vec::new();
        for file in &self.env_file {
            env.extend(process::env_file(&text::read(file)?));
        }
        env.append(&mut self.env);
        if let Some(nameless) = env.iter().find(|variable| matches!(variable.as_encoded_bytes(), [] | [b'=', ..])) {
            bail!("invalid environment variable {nameless:?}: use NAME=VALUE or NAME");
        }
        let (working_dir, user) = (self.workdir.take(), self.user.take());
        Ok(Overrides { command, env, working_dir, user, ..Overrides::default() })
    }

    /// Fails early if an environment file does not exist. It is read only once, since it may be a pipe.
    pub fn check_files(&self) -> Result<()> {
        self.env_file.iter().try_for_each(|file| text::check_exists(file))
    }

    /// Overwrites the values of environment variables in this process's visible arguments. Must be called before other
    /// threads are started.
    pub fn mask_values(&self) {
        argv::mask_values(&self.env);
    }

    /// Fails if an interactive terminal is requested and standard input is not a terminal.
    pub fn check_terminal(&self) -> Result<()> {
        if self.tty && self.interactive && !stdin().is_terminal() {
            bail!("standard input is not a terminal: remove -t");
        }
        Ok(())
    }
}
