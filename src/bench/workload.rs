//! The work program (firmware/work), which husk carries.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The file: static, so that it runs in any root and as any kernel's first process.
pub const PROGRAM: &[u8] = include_bytes!(env!("HUSK_WORK"));

/// Writes the program into a directory, as `work`, for all to run.
pub fn write(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("work");
    fs::write(&path, PROGRAM)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o755)))
        .with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// A word as it may stand on a kernel's command line, which the program reads as the word: a space becomes `%20`.
///
/// To be used for the words of `guest`'s command, and for no others.
pub fn escape(word: &str) -> String {
    let escaped = word.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        b'-' | b'_' | b'.' | b'/' | b'=' | b':' | b',' | b'+' | b'@' => char::from(byte).to_string(),
        other => format!("%{other:02x}"),
    });
    // A lone `--` would end what a kernel passes on, and an empty word would be none.
    match word {
        "" => "%00".into(),
        "--" => "%2d%2d".into(),
        _ => escaped.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pass_a_kernels_command_line() {
        assert_eq!(escape("/bin/sh"), "/bin/sh");
        assert_eq!(escape("cpu-integer=100"), "cpu-integer=100");
        assert_eq!(escape("echo \"a b\" 5%"), "echo%20%22a%20b%22%205%25");
        assert_eq!([escape(""), escape("--"), escape("é")], ["%00", "%2d%2d", "%c3%a9"]);
    }

    #[test]
    fn the_program_is_static_and_loads_where_it_was_linked() {
        // ELF: e_type ET_EXEC, and no interpreter's path.
        assert_eq!((&PROGRAM[..4], &PROGRAM[16..18]), (&b"\x7fELF"[..], &[2, 0][..]));
        assert!(!PROGRAM.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }
}
