//! Leaves options out of a command line of husk.

use std::ffi::{OsStr, OsString};

use anyhow::{Context, Result};
use clap::{Arg, CommandFactory};

use crate::cli::{Cli, argv};

/// The command in `words`, and its arguments without the options that have one of these `names` (those of the fields that hold
/// them). What belongs to the image is left as it is.
pub(super) fn without(words: &[OsString], names: &[&str]) -> Result<(OsString, Vec<OsString>)> {
    let place = argv::command_index(words)?;
    let command = words.get(place).cloned().unwrap_or_default();
    let mut all = Cli::command();
    all.build();
    let options = all.find_subcommand(&command).context("husk has no such command")?.clone();
    let mut rest = words.iter().skip(place + 1);
    let mut left = Vec::new();
    while let Some(word) = rest.next() {
        let text = word.to_string_lossy();
        if text == "--" || !text.starts_with('-') || text == "-" {
            left.push(word.clone());
            break;
        }
        let is_unwanted = |option: &Arg| names.contains(&option.get_id().as_str());
        let (kept, needs_value, drops_value) = match text.strip_prefix("--") {
            Some(long) => {
                let name = long.split_once('=').map_or(long, |(name, _)| name);
                let option = options.get_arguments().find(|option| is_called(option, name));
                let option = option.with_context(|| format!("husk has no option {text}"))?;
                let needs = takes_value(option) && !long.contains('=');
                ((!is_unwanted(option)).then(|| word.clone()), needs, is_unwanted(option))
            }
            None => short_options(&options, word, &is_unwanted)?,
        };
        left.extend(kept);
        let value = if needs_value { rest.next() } else { None };
        left.extend(value.filter(|_| !drops_value).cloned());
    }
    left.extend(rest.cloned());
    Ok((command, left))
}

/// What is left of a group of short options, whether the last one has its value in the next word, and whether that one is left out.
fn short_options(
    options: &clap::Command,
    word: &OsStr,
    is_unwanted: &dyn Fn(&Arg) -> bool,
) -> Result<(Option<OsString>, bool, bool)> {
    let text = word.to_str().unwrap_or_default();
    let mut left = String::from("-");
    for (at, letter) in text.char_indices().skip(1) {
        let option = options.get_arguments().find(|option| option.get_short() == Some(letter));
        // A value that is no text follows its option.
        let Some(option) = option else { return Ok((Some(word.to_owned()), false, false)) };
        let value = text.get(at + letter.len_utf8()..).unwrap_or_default();
        if takes_value(option) {
            if is_unwanted(option) {
                return Ok(((left.len() > 1).then(|| left.into()), value.is_empty(), true));
            }
            left.push(letter);
            return Ok((Some((left + value).into()), value.is_empty(), false));
        }
        if !is_unwanted(option) {
            left.push(letter);
        }
    }
    Ok(((left.len() > 1).then(|| left.into()), false, false))
}

fn is_called(option: &Arg, name: &str) -> bool {
    option.get_long() == Some(name) || option.get_all_aliases().unwrap_or_default().contains(&name)
}

/// Whether the value may be the next word.
fn takes_value(option: &Arg) -> bool {
    option.get_action().takes_values() && !option.is_require_equals_set()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_given_options_are_left_out() {
        for (words, expected) in [
            ("run -d --name web -e A=1 debian sh -d", "run -e A=1 debian sh -d"),
            ("run -dit --name=web debian", "run -it debian"),
            ("--verbose create --rm --restart always -p 80:80 --cidfile f -- x", "create -p 80:80 -- x"),
            ("run -itd --os-init=/sbin/init --detach x --name y", "run -it --os-init=/sbin/init x --name y"),
            ("run -v /a:/b -dv /c:/d x", "run -v /a:/b -v /c:/d x"),
            ("boot -d --kernel k --disk d,ro", "boot --kernel k --disk d,ro"),
        ] {
            let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let (command, left) = without(&words, &["detach", "rm", "name", "restart", "cidfile"]).unwrap();
            let left: Vec<OsString> = [command].into_iter().chain(left).collect();
            assert_eq!(left, expected.split(' ').map(OsString::from).collect::<Vec<_>>());
        }
        assert!(without(&["run".into(), "--nothing".into(), "x".into()], &[]).is_err());
    }
}
