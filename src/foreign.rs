//! Sanitizes text from outside husk (a registry, an image, a guest, another program) before it is printed. All such
//! text passes through this module, which alone decides what could affect a terminal. A guest's own streams do not,
//! because the terminal is theirs.

use std::borrow::Cow;

use serde::Serialize;

/// Replaces a character that must not be printed.
const COVER: char = '\u{fffd}';

/// Whether a terminal may interpret a character as a command or reorder text because of it: control characters
/// (Unicode's Cc: those of ASCII, and C1, one of which starts an escape sequence), line separators, and bidirectional
/// formatting characters (Unicode Standard Annex #9).
pub fn is_command(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` as a single line that is safe to print.
pub fn line(text: &str) -> Cow<'_, str> {
    clean(text, is_command)
}

/// `text` with its line breaks and tabs, and nothing else that affects a terminal.
pub fn lines(text: &str) -> Cow<'_, str> {
    clean(text, |c| is_command(c) && c != '\n' && c != '\t')
}

fn clean(text: &str, is_covered: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_covered) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if is_covered(c) { COVER } else { c }).collect())
}

/// `value` as multi-line JSON that is safe to print: affected characters are escaped, so that the JSON still parses to
/// the same value.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(escaped)
}

/// The same on a single line.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(escaped)
}

fn escaped(text: String) -> String {
    // All of them are within strings, where ASCII control characters are already escaped.
    let escape = |c: char| if is_command(c) && c != '\n' { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    if text.contains(|c| is_command(c) && c != '\n') { text.chars().map(escape).collect() } else { text }
}

/// `text` joined into one line, without the error numbers that the standard library appends to system errors.
pub fn one_line(text: &str) -> String {
    let line = text.lines().map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    let mut pieces = line.split(" (os error ");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |line, piece| line + piece.split_once(')').map_or("", |(_number, rest)| rest))
}

/// The start of `text`, at most `max_bytes` long.
pub fn start_of(text: &str, max_bytes: usize) -> &str {
    let cut = (0..=max_bytes.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.get(..cut.unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NASTY: &str = "a\x1b]0;owned\x07\u{9b}2J\u{202e}b\r\nc\td\u{7f}\u{2028}é…";

    #[test]
    fn control_characters_are_removed() {
        assert_eq!(
            line(NASTY),
            "a\u{fffd}]0;owned\u{fffd}\u{fffd}2J\u{fffd}b\u{fffd}\u{fffd}c\u{fffd}d\u{fffd}\u{fffd}é…"
        );
        assert_eq!(lines("a\n\tb\r\x1b"), "a\n\tb\u{fffd}\u{fffd}");
        assert!(matches!(line("plain é"), Cow::Borrowed(_)));
    }

    #[test]
    fn sanitized_json_parses_to_the_same_value() {
        let text = json(&vec![NASTY]).unwrap();
        assert!(!text.contains(|c| is_command(c) && c != '\n'), "{text:?}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), [NASTY]);
    }

    #[test]
    fn an_error_is_one_line() {
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = anyhow::Error::from(missing).context("open disk /x.img");
        assert_eq!(one_line(&format!("{error:#}\n")), "open disk /x.img: No such file or directory");
        assert_eq!(one_line("a (os error 2): b\n  c (os error 13)"), "a: b c");
    }
}
