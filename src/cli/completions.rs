//! `husk completions`: generates a shell's completion script.

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::exit::Exit;

const EXAMPLES: &str = "\
Examples:
  husk completions bash > ~/.local/share/bash-completion/completions/husk
  husk completions zsh > ~/.zfunc/_husk
  husk completions fish > ~/.config/fish/completions/husk.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// Shell to generate the script for
    shell: Shell,
}

impl Completions {
    /// Prints the script.
    pub fn run(self) -> Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "husk", &mut script);
        super::print(&String::from_utf8_lossy(&script))?;
        Ok(Exit::Success)
    }
}
