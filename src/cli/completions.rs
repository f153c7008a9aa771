//! `husk completions`: generates a shell's completion script, which asks `husk __complete` for names.

use anyhow::Result;
use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::exit::Exit;
use super::reach;
use crate::image::Store;
use crate::resources::bridge;
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  husk completions bash > ~/.local/share/bash-completion/completions/husk
  husk completions zsh > ~/.zfunc/_husk
  husk completions fish > ~/.config/fish/completions/husk.fish

In bash, zsh and fish, names of machines, images, volumes and networks are completed as well.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// Shell to generate the script for
    shell: Shell,
}

/// What can be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Machines,
    Running,
    Images,
    Volumes,
    Networks,
}

/// The arguments of these commands. Of several words, the last one is a subcommand.
const NAMES: [(&str, &str); 5] = [
    ("machines", "rm start restart rename wait logs inspect cp diff export commit"),
    ("running", "exec attach stats update stop kill pause unpause snapshot suspend top port"),
    ("images", "run create rmi tag save push history warm"),
    ("volumes", "volume"),
    ("networks", "network"),
];

#[derive(Debug, Args)]
pub(super) struct Names {
    kind: Kind,
}

impl Completions {
    /// Prints the script.
    pub fn run(self) -> Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "husk", &mut script);
        super::print(&with_names(self.shell, &String::from_utf8_lossy(&script)))?;
        Ok(Exit::Success)
    }
}

/// Clap's script with what completes names.
fn with_names(shell: Shell, script: &str) -> String {
    let cases =
        |line: &dyn Fn(&str, &str) -> String| NAMES.iter().map(|(kind, words)| line(kind, words)).collect::<String>();
    match shell {
        Shell::Bash => {
            let cases = cases(&|kind, words| format!("        {}) kind={kind} ;;\n", words.replace(' ', "|")));
            script.to_owned() + &BASH.replace("CASES\n", &cases)
        }
        Shell::Zsh => {
            let cases = cases(&|kind, words| {
                format!("        husk-command-({0})|husk-({0})-command-*) kind={kind} ;;\n", words.replace(' ', "|"))
            });
            // Clap's last lines complete the first word of a session.
            let (functions, end) = script.rsplit_once(ZSH_END).unwrap_or((script, ""));
            let positional = |line: &str| match line.starts_with("'*:") || line.starts_with("':") {
                true => line.replace(":_default'", ":_husk_names'") + "\n",
                false => line.to_owned() + "\n",
            };
            let functions: String = functions.lines().map(positional).collect();
            functions + &ZSH.replace("CASES\n", &cases) + ZSH_END + end
        }
        Shell::Fish => {
            let names = cases(&|kind, words| {
                let no_files = if FILES.contains(&kind) { "" } else { " -f" };
                format!(
                    "complete -c husk{no_files} -n '__fish_seen_subcommand_from {words}' -a '(command husk __complete {kind} 2>/dev/null)'\n"
                )
            });
            script.to_owned() + &names
        }
        _ => script.to_owned(),
    }
}

/// Where a file may stand as well: `husk run ./image.tar`, `husk cp FILE MACHINE:PATH`.
const FILES: [&str; 2] = ["images", "machines"];

/// Names where a word is no option, and otherwise what clap knows.
const BASH: &str = r#"
_husk_with_names() {
    local cur=${COMP_WORDS[COMP_CWORD]} kind=
    case ${COMP_WORDS[1]-} in
CASES
    esac
    _husk "$@"
    if [[ -n $kind && $COMP_CWORD -gt 1 && $cur != -* ]]; then
        # Names may contain colons, at which bash splits words.
        local before=
        [[ $COMP_WORDBREAKS == *:* && $cur == : ]] && cur=
        if [[ ${COMP_WORDS[COMP_CWORD-1]} == : ]]; then before=${COMP_WORDS[COMP_CWORD-2]}:; fi
        local name
        while read -r name; do
            [[ $name == "$before$cur"* ]] && COMPREPLY+=("${name#"$before"}")
        done < <(command husk __complete "$kind" 2>/dev/null)
    fi
}
complete -F _husk_with_names -o nosort -o bashdefault -o default husk 2>/dev/null || complete -F _husk_with_names -o bashdefault -o default husk
"#;

/// Where clap's script begins to complete.
const ZSH_END: &str = "if [ \"$funcstack[1]\" ";

/// Completes arguments that are no options. Clap leaves the subcommand in the context.
const ZSH: &str = r#"
_husk_names() {
    local kind=
    local -a names
    case ${${curcontext%:*}##*:} in
CASES
    esac
    if [[ -n $kind ]]; then
        names=(${(f)"$(command husk __complete $kind 2>/dev/null)"})
        compadd -a names
    fi
    [[ -n $kind && $kind != (images|machines) ]] || _files
}

"#;

impl Names {
    /// Prints the names of this kind, one a line.
    pub fn run(self) -> Result<Exit> {
        let names: Vec<String> = match self.kind {
            Kind::Machines => machines(false)?,
            Kind::Running => machines(true)?,
            Kind::Images => Store::open_default()?.list()?.into_iter().flat_map(|image| image.names).collect(),
            Kind::Volumes => Store::open_default()?.volumes()?.into_iter().map(|volume| volume.name).collect(),
            Kind::Networks => bridge::list()?.into_iter().map(|network| network.name).collect(),
        };
        super::print(&names.iter().map(|name| format!("{name}\n")).collect::<String>())?;
        Ok(Exit::Success)
    }
}

fn machines(only_running: bool) -> Result<Vec<String>> {
    let mut entries = reach::machines(&StateDir::open()?)?;
    entries.retain(|entry| entry.alive || !only_running);
    Ok(entries.iter().map(|entry| entry.name().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_commands_that_exist_have_names() {
        let command = super::super::Cli::command();
        let known = |word: &str| command.find_subcommand(word).is_some();
        // Those of other commands do no harm, as long as most exist.
        for (kind, words) in NAMES {
            assert!(Kind::from_str(kind, false).is_ok(), "{kind}");
            assert!(words.split(' ').filter(|word| known(word)).count() * 2 > words.split(' ').count(), "{words}");
        }
    }
}
