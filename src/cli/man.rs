//! `husk man`: generates manual pages.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Command, CommandFactory};

use super::exit::Exit;
use crate::resources;

const EXAMPLES: &str = "\
Examples:
  husk man | man -l -
  sudo husk man /usr/local/share/man/man1";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Man {
    /// Directory to write the pages of all commands to; without it, husk(1) is printed
    dir: Option<PathBuf>,
}

impl Man {
    /// Prints the main page, or writes all of them.
    pub fn run(self) -> Result<Exit> {
        let mut husk = super::Cli::command().disable_help_subcommand(true);
        husk.build();
        match self.dir {
            None => super::print(&page(&husk)?)?,
            Some(dir) => {
                for command in
                    std::iter::once(&husk).chain(husk.get_subcommands().filter(|command| !command.is_hide_set()))
                {
                    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
                    resources::text::write(&dir.join(format!("{name}.1")), &page(command)?)?;
                }
            }
        }
        Ok(Exit::Success)
    }
}

fn page(command: &Command) -> Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).context("render a manual page")?;
    String::from_utf8(page).context("render a manual page")
}
