//! Booleans as Docker has them: a flag without a value may also be `--flag=true`, or `--flag=false` for none.

use std::borrow::Cow;
use std::ffi::OsString;

use clap::{Arg, ArgAction, Command, CommandFactory};

use super::Cli;

/// The command line without the values of such flags. All words from the image of `husk run` on, or from the machine of `husk exec`,
/// are left as they are.
pub fn without_values(words: &[OsString]) -> Cow<'_, [OsString]> {
    if !words.iter().any(|word| word.to_str().and_then(split).is_some()) {
        return Cow::Borrowed(words);
    }
    let mut cli = Cli::command();
    cli.build();
    Cow::Owned(resolve(&cli, words))
}

/// A flag, or several in one word, and its boolean.
fn split(word: &str) -> Option<(&str, bool)> {
    let (flag, value) = word.split_once('=').filter(|(flag, _)| flag.starts_with('-'))?;
    // What Go's strconv.ParseBool takes.
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some((flag, true)),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some((flag, false)),
        _ => None,
    }
}

fn resolve(cli: &Command, words: &[OsString]) -> Vec<OsString> {
    let mut command = cli;
    let mut resolved: Vec<OsString> = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let text = word.to_str().unwrap_or_default();
        let is_flag = text.len() > 1 && text.starts_with('-');
        if let Some((flag, value)) = split(text)
            && last_flag(command, flag).is_some_and(is_switch)
        {
            let spelled = spelled(flag, value, &mut resolved);
            resolved.extend(spelled.map(OsString::from));
            continue;
        }
        resolved.push(word.clone());
        if is_flag && text != "--" {
            if last_flag(command, text).is_some_and(wants_next_word) {
                resolved.extend(rest.next().cloned());
            }
        } else if let Some(subcommand) = command.find_subcommand(text) {
            command = subcommand;
        } else if text == "--" || command.get_positionals().any(Arg::is_trailing_var_arg_set) {
            break;
        }
    }
    resolved.extend(rest.cloned());
    resolved
}

/// The word for a flag with this value, if there is one. The last value counts, so that a false one takes back what is in `before`.
fn spelled(flag: &str, value: bool, before: &mut Vec<OsString>) -> Option<String> {
    if value {
        return Some(flag.to_owned());
    }
    before.retain(|word| word != flag);
    let is_long = flag.starts_with("--");
    // The last letter of several.
    let others = flag.get(..flag.len().saturating_sub(1)).filter(|others| !is_long && *others != "-")?;
    Some(others.to_owned())
}

/// The flag that `word` is or, of several letters, the one that has the value; `None` if it has its value already.
fn last_flag<'a>(command: &'a Command, word: &str) -> Option<&'a Arg> {
    if let Some(name) = word.strip_prefix("--") {
        let has_name = |arg: &&Arg| arg.get_long() == Some(name) || has(arg.get_all_aliases(), &name);
        return command.get_arguments().find(has_name);
    }
    let letters = word.strip_prefix('-')?;
    for (at, letter) in letters.char_indices() {
        let has_letter = |arg: &&Arg| arg.get_short() == Some(letter) || has(arg.get_all_short_aliases(), &letter);
        let arg = command.get_arguments().find(has_letter)?;
        let is_last = at + letter.len_utf8() == letters.len();
        if is_last || wants_next_word(arg) {
            return is_last.then_some(arg);
        }
    }
    None
}

fn has<T: PartialEq>(names: Option<Vec<T>>, name: &T) -> bool {
    names.is_some_and(|names| names.contains(name))
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// Whether the value of a flag follows in the next word.
fn wants_next_word(arg: &Arg) -> bool {
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    takes_value && arg.get_num_args().is_none_or(|values| values.min_values() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_without_a_value_has_a_boolean_as_in_docker() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        for (typed, meant) in [
            ("run --rm=true -d=false x", "run --rm x"),
            ("run -it=false x", "run -i x"),
            ("run -it=true x", "run -it x"),
            ("run -i=1 -t=T --read-only=False x", "run -i -t x"),
            ("run --rm --rm=false x", "run x"),
            ("run --name a=true -e A=true --env=B=false x", "run --name a=true -e A=true --env=B=false x"),
            ("run -e --rm=true x", "run -e --rm=true x"),
            ("run x ls --color=true -a=false", "run x ls --color=true -a=false"),
            ("run --rm=true -- x --rm=true", "run --rm -- x --rm=true"),
            ("exec -it=false web ls --color=false", "exec -i web ls --color=false"),
            ("logs web --follow=true", "logs web --follow"),
            ("container rm --force=true web", "container rm --force web"),
            ("ps -a=true -q=false", "ps -a"),
            ("run --rm=maybe x", "run --rm=maybe x"),
            ("run --sig-proxy=false --prefault=false x", "run --sig-proxy=false --prefault=false x"),
            ("attach --sig-proxy=false web", "attach --sig-proxy=false web"),
            ("frobnicate --x=true", "frobnicate --x=true"),
        ] {
            assert_eq!(without_values(&words(typed)).into_owned(), words(meant), "{typed}");
        }
    }
}
