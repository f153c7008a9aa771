//! Usage errors as one line, with hints for Docker options and commands that husk does not have.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::argv;
use super::exit::Exit;
use super::print_error;

/// Handles `--help` and `--version`, and prints usage errors on one line.
pub fn report_usage(error: &clap::Error) -> Exit {
    let text = error.render().to_string();
    match text.strip_prefix("error: ") {
        Some(text) => print_error(&line(error, text, &arguments())),
        // Help, requested or shown because there is no command.
        None => drop(error.print()),
    }
    match error.exit_code() {
        0 => Exit::Success,
        _ if matches!(arguments().first().map(String::as_str), Some("run" | "exec")) => Exit::NotRun,
        _ => Exit::Usage,
    }
}

/// The command and everything after it.
fn arguments() -> Vec<String> {
    let arguments = argv::all();
    let command = argv::command_index(arguments).unwrap_or(arguments.len());
    arguments.iter().skip(command).map(|word| word.to_string_lossy().into_owned()).collect()
}

/// The first sentence of clap's `text`, and a hint: our own if there is one, otherwise clap's if it is helpful.
fn line(error: &clap::Error, text: &str, arguments: &[String]) -> String {
    let what = text.split("\n\n").next().unwrap_or(text);
    // Arguments that start with a dash are rarely meant as values.
    let can_help = |tip: &&str| !tip.contains("as a value");
    let tip = text.lines().filter_map(|line| line.trim_start().strip_prefix("tip: ")).find(can_help);
    let of = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.as_str()),
        _ => None,
    };
    let ours = match error.kind() {
        ErrorKind::InvalidSubcommand => {
            of(ContextKind::InvalidSubcommand).and_then(|word| command_hint(arguments, word))
        }
        ErrorKind::InvalidValue if arguments.last().is_some_and(|word| word == "-h") => Some("use --help for help"),
        ErrorKind::UnknownArgument => of(ContextKind::InvalidArg).and_then(|word| option_hint(arguments, word)),
        _ => None,
    };
    if error.kind() == ErrorKind::MissingRequiredArgument
        && let Some(usage) = text.lines().find_map(|line| line.trim_start().strip_prefix("Usage: "))
    {
        let words: Vec<&str> = what.split_whitespace().collect();
        return format!("{}: use {usage}", words.join(" "));
    }
    match (ours, tip) {
        (Some(hint), _) => format!("{what}: {hint}"),
        (None, Some(tip)) => format!("{what}; tip: {tip}"),
        (None, None) => what.to_owned(),
    }
}

/// The alternative to a Docker command that husk does not have.
fn command_hint(arguments: &[String], command: &str) -> Option<&'static str> {
    let group = arguments.first()?;
    if group != command {
        return match (group.as_str(), command) {
            ("container", "run" | "create") => Some("use `husk run` or `husk create`"),
            ("image", "build") => command_hint(&["build".to_owned()], "build"),
            ("volume" | "network", "update") => Some("remove it, and create it again"),
            _ => None,
        };
    }
    Some(match command {
        "build" | "buildx" => {
            "use docker, podman or buildah to make images, and `husk load` or `husk pull` to get them"
        }
        "compose" | "up" | "down" | "kube" | "pod" | "service" | "stack" | "swarm" => {
            "start each machine by itself, with `husk network create` for a common network"
        }
        "context" => "there is no daemon to choose",
        "machine" => "a machine is what docker calls a container: use `husk ps` or `husk run`",
        "search" => "look on the registry's web page, and `husk pull` what you find there",
        _ => return None,
    })
}

/// The alternative to a Docker option that husk does not have.
fn option_hint(arguments: &[String], option: &str) -> Option<&'static str> {
    let command = arguments.first()?.as_str();
    let is = |flag: &str| option == flag || option.strip_prefix(flag).is_some_and(|rest| rest.starts_with('='));
    match command {
        "run" | "create" => super::run::refusal(option),
        "exec" if option == "--privileged" => {
            Some("root has all capabilities in its machine, unless --cap-drop of husk run dropped some")
        }
        _ if option == "-v" => Some("use --verbose"),
        "stats" | "disks" if ["-f", "--filter", "--format"].into_iter().any(is) => {
            Some("use --json, and select with `jq`")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Cli;
    use super::*;

    fn error_line(arguments: &[&str]) -> String {
        let error =
            Cli::try_parse_from([&["husk"], arguments].concat()).err().unwrap_or_else(|| panic!("{arguments:?}"));
        let text = error.render().to_string();
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        line(&error, text.strip_prefix("error: ").unwrap(), &arguments)
    }

    #[test]
    fn errors_name_the_replacement_of_dockers_options() {
        for (arguments, hint) in [
            (&["build"][..], "docker, podman or buildah"),
            (&["image", "build", "."], "docker, podman or buildah"),
            (&["container", "run", "x"], "use `husk run`"),
            (&["up"], "start each machine by itself"),
            (&["machine", "ls"], "husk ps"),
            (&["ps", "-v"], "use --verbose"),
            (&["run", "--memroy", "1G", "x"], "--memory"),
            (&["run", "--gpus", "all", "x"], "no access to the host's GPUs"),
            (&["run", "--device=/dev/kvm", "x"], "devices of its own"),
            (&["run", "-h"], "--help"),
            (&["run", "-it"], "use husk run [OPTIONS] IMAGE [COMMAND] [ARG]..."),
            (&["exec", "--privileged", "web", "sh"], "all capabilities"),
            (&["compose", "up"], "husk network create"),
            (&["disks", "--filter", "name=x"], "--json"),
            (&["histroy"], "unrecognized subcommand 'histroy'"),
        ] {
            let line = error_line(arguments);
            assert!(line.contains(hint), "{arguments:?}: {line}");
            assert!(!line.contains('\n') && !line.contains("as a value"), "{arguments:?}: {line}");
        }
    }
}
