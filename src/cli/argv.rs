//! The arguments of this process or, for a machine in the background, those that its parent sends it.
//!
//! Everybody on the host may read /proc/PID/cmdline, and values of `-e` may be secrets. So a machine in the background has its
//! words from a pipe, its standard input; and who stays in the foreground covers those values, as curl does with passwords.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write, stdin};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::sys;

/// Tells a process that it is the one in the background: the second of its arguments, behind the command.
pub const IN_BACKGROUND: &str = "--in-background";
/// More than execve(2) takes of arguments and variables together.
const MAX_BYTES: u64 = 8 << 20;

static ARGV: OnceLock<Vec<OsString>> = OnceLock::new();

/// Finds the words out, without the program's name. To be called once, before standard input is read and before there is
/// another thread. Fails where words were to be handed over and did not come whole.
pub fn read() -> Result<&'static [OsString]> {
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if words.get(1).is_some_and(|word| word == IN_BACKGROUND) {
        let read = || -> Result<Vec<OsString>> {
            let mut handed = Vec::new();
            stdin().lock().take(MAX_BYTES + 1).read_to_end(&mut handed)?;
            // The pipe has served; whoever this process starts is not to have it either.
            rustix::stdio::dup2_stdin(&File::open("/dev/null")?)?;
            unpack(&handed)
        };
        let typed = read().context("read the command line from the parent process")?;
        let added = words.split_off(1);
        words = typed;
        let place = command_index(&words)? + 1;
        words.splice(place..place, added);
    }
    Ok(ARGV.get_or_init(|| words))
}

/// The words that [`read`] found.
pub fn all() -> &'static [OsString] {
    ARGV.get().map_or(&[], Vec::as_slice)
}

/// Where the command stands among `words`: husk's own options may come before it.
pub fn command_index(words: &[OsString]) -> Result<usize> {
    words.iter().position(|word| !word.as_encoded_bytes().starts_with(b"-")).context("find the command")
}

/// Hands `words` over to a process that has [`IN_BACKGROUND`].
pub fn send(words: &[OsString], mut pipe: impl Write) -> std::io::Result<()> {
    pipe.write_all(&pack(words))
}

/// The number of words, so that half of them are not taken for all, and each of them, all with a NUL behind.
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

/// Covers the values of `variables`, `NAME=VALUE` each, where others see this process's arguments. What [`all`] returns stays.
pub fn mask_values(variables: &[OsString]) {
    let arguments = || std::env::args_os().enumerate().map(|(at, word)| (at, word.into_vec()));
    let mut covered = Vec::new();
    for (at, word) in arguments() {
        // However the option before it is written: `-e NAME=VALUE`, `-eNAME=VALUE`, `--env=NAME=VALUE`.
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
    fn words_are_handed_over_as_they_are_or_not_at_all() {
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
    fn a_value_is_what_stands_behind_the_first_equals_sign() {
        assert_eq!(value_of(&"A=b=c".into()), Some(OsStr::new("b=c")));
        assert_eq!(value_of(&"A=".into()), Some(OsStr::new("")));
        assert_eq!(value_of(&"A".into()), None);
    }
}
