//! The command line of this process or, for a machine in the background, the one received from its parent.
//!
//! /proc/PID/cmdline is readable by everyone, and values of `-e` may be secrets. Therefore a process in the background
//! receives its arguments through a pipe on standard input, and one in the foreground overwrites these values, as curl
//! does with passwords.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write, stdin};
use std::iter::once;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::OnceLock;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::sys;

/// The marker of a process in the background: its second argument, after the command.
pub const IN_BACKGROUND: &str = "--in-background";
/// More than the limit of execve(2) for arguments and environment together.
const MAX_BYTES: u64 = 8 << 20;

static ARGV: OnceLock<Vec<OsString>> = OnceLock::new();

/// The name by which husk is an OCI runtime.
const OCI_NAME: &str = "husk-oci";
/// The name by which husk is a shim of containerd, for the runtime io.containerd.husk.v2.
pub const SHIM_NAME: &str = "containerd-shim-husk-v2";

/// Determines the arguments, without the program's name. Must be called once, before standard input is read and before
/// other threads are started. Fails if arguments from the pipe are incomplete.
pub fn read() -> Result<&'static [OsString]> {
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let path = std::env::args_os().next().unwrap_or_default();
    match Path::new(&path).file_name().and_then(OsStr::to_str) {
        Some(OCI_NAME) => words.insert(0, "oci".into()),
        // containerd writes flags as Go does.
        Some(SHIM_NAME) => words = once("shim".into()).chain(words.into_iter().map(with_two_dashes)).collect(),
        _ => {}
    }
    if words.get(1).is_some_and(|word| word == IN_BACKGROUND) {
        let read = || -> Result<Vec<OsString>> {
            let mut handed = Vec::new();
            stdin().lock().take(MAX_BYTES + 1).read_to_end(&mut handed)?;
            // The pipe has served its purpose, and must not be inherited.
            rustix::stdio::dup2_stdin(&File::open("/dev/null")?)?;
            unpack(&handed)
        };
        let typed = read().context("read the command line from the parent process")?;
        let added = words.split_off(1);
        words = typed;
        let place = command_index(&words)? + 1;
        words.splice(place..place, added);
    }
    Ok(ARGV.get_or_init(|| spell_out(words)))
}

/// `-flag` as `--flag`.
fn with_two_dashes(word: OsString) -> OsString {
    match word.as_bytes() {
        b"-v" => "--version".into(),
        [b'-', letter, _, ..] if *letter != b'-' => [OsString::from("-"), word].into_iter().collect(),
        _ => word,
    }
}

/// Replaces `-vv`, `-vvv` and so on among husk's options, and right behind the command, by as many `--verbose`: `-v` alone is a
/// volume of `husk run`.
fn spell_out(words: Vec<OsString>) -> Vec<OsString> {
    let mut commands = 0;
    let levels = |word: &OsString| {
        let letters = word.as_bytes().strip_prefix(b"-").filter(|letters| letters.len() > 1);
        letters.filter(|letters| letters.iter().all(|letter| *letter == b'v')).map_or(0, <[u8]>::len)
    };
    let spell = |word: OsString| {
        commands += usize::from(!word.as_bytes().starts_with(b"-"));
        match levels(&word) {
            count @ 1.. if commands < 2 => vec![OsString::from("--verbose"); count],
            _ => vec![word],
        }
    };
    words.into_iter().flat_map(spell).collect()
}

/// The arguments found by [`read`].
pub fn all() -> &'static [OsString] {
    ARGV.get().map_or(&[], Vec::as_slice)
}

/// The index of the command in `words`, after husk's global options.
pub fn command_index(words: &[OsString]) -> Result<usize> {
    words.iter().position(|word| !word.as_encoded_bytes().starts_with(b"-")).context("find the command")
}

/// Sends `words` to a process started with [`IN_BACKGROUND`].
pub fn send(words: &[OsString], mut pipe: impl Write) -> std::io::Result<()> {
    pipe.write_all(&pack(words))
}

/// The number of words, so that truncation is detected, followed by each word; all NUL-terminated.
fn pack(words: &[OsString]) -> Vec<u8> {
    let mut packed = format!("{}\0", words.len()).into_bytes();
    for word in words {
        packed.extend_from_slice(word.as_bytes());
        packed.push(0);
    }
    packed
}

fn unpack(packed: &[u8]) -> Result<Vec<OsString>> {
    ensure!(packed.len() as u64 <= MAX_BYTES, "more than {MAX_BYTES} bytes");
    let packed = packed.strip_suffix(b"\0").context("it is incomplete")?;
    let mut parts = packed.split(|&byte| byte == 0);
    let count: Option<usize> = parts.next().and_then(|count| std::str::from_utf8(count).ok()?.parse().ok());
    let words: Vec<OsString> = parts.map(|word| OsString::from_vec(word.to_vec())).collect();
    ensure!(count == Some(words.len()), "arguments are missing");
    Ok(words)
}

/// Overwrites the values of `variables`, `NAME=VALUE` each, in this process's visible arguments. The result of [`all`]
/// is not affected.
pub fn mask_values(variables: &[OsString]) {
    let arguments = || std::env::args_os().enumerate().map(|(at, word)| (at, word.into_vec()));
    let mut covered = Vec::new();
    for (at, word) in arguments() {
        // For all spellings of the option: `-e NAME=VALUE`, `-eNAME=VALUE`, `--env=NAME=VALUE`.
        let value = variables.iter().filter(|variable| word.ends_with(variable.as_bytes())).filter_map(value_of);
        if let Some(len) = value.map(OsStr::len).max().filter(|&len| len > 0) {
            covered.push((at, word.len() - len));
        }
    }
    if let Err(error) = sys::arguments::cover(&covered) {
        log::warn!("values of -e are visible in the process arguments: {error}");
    }
}

fn value_of(variable: &OsString) -> Option<&OsStr> {
    let bytes = variable.as_bytes();
    bytes.iter().position(|&byte| byte == b'=').and_then(|at| bytes.get(at + 1..)).map(OsStr::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_received_unchanged_or_rejected() {
        let words: Vec<OsString> = ["run", "", "-e", "A=\n b"]
            .into_iter()
            .map(OsString::from)
            .chain([OsString::from_vec(vec![0xff])])
            .collect();
        let packed = pack(&words);
        assert_eq!(unpack(&packed).unwrap(), words);
        assert_eq!(unpack(&pack(&[])).unwrap(), Vec::<OsString>::new());
        for len in 0..packed.len() {
            assert!(unpack(&packed[..len]).is_err(), "{len} bytes of them");
        }
        assert!(unpack(&[packed, vec![b'x', 0]].concat()).is_err());
    }

    #[test]
    fn only_the_verbosity_of_husk_is_spelled_out() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        for (typed, meant) in [
            ("-vv ps", "--verbose --verbose ps"),
            ("run -vvv x", "run --verbose --verbose --verbose x"),
            ("run -v /a:/b x", "run -v /a:/b x"),
            ("run x ls -vv", "run x ls -vv"),
            ("run -vva:/b x", "run -vva:/b x"),
        ] {
            assert_eq!(spell_out(words(typed)), words(meant), "{typed}");
        }
    }

    #[test]
    fn flags_of_containerd_have_one_dash() {
        for (written, meant) in
            [("-namespace", "--namespace"), ("--id", "--id"), ("-v", "--version"), ("start", "start"), ("-", "-")]
        {
            assert_eq!(with_two_dashes(written.into()), meant, "{written}");
        }
    }

    #[test]
    fn a_value_follows_the_first_equals_sign() {
        assert_eq!(value_of(&"A=b=c".into()), Some(OsStr::new("b=c")));
        assert_eq!(value_of(&"A=".into()), Some(OsStr::new("")));
        assert_eq!(value_of(&"A".into()), None);
    }
}
