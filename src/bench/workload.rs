//! The workload program (`firmware/workload`), embedded in husk.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The executable. It is static, so that it runs in any root and as init.
pub const PROGRAM: &[u8] = include_bytes!(env!("HUSK_WORKLOAD"));

/// Writes the executable into a directory, as `work`.
pub fn write(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("work");
    fs::write(&path, PROGRAM)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o755)))
        .with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// Escapes an argument for the kernel command line, in percent-encoding. Decoded by the workload program's `guest`
/// command only.
pub fn escape(word: &str) -> String {
    let escaped = word.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        b'-' | b'_' | b'.' | b'/' | b'=' | b':' | b',' | b'+' | b'@' => char::from(byte).to_string(),
        other => format!("%{other:02x}"),
    });
    // The kernel stops passing arguments at a lone `--`, and drops empty ones.
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
    fn arguments_survive_a_kernel_command_line() {
        assert_eq!(escape("/bin/sh"), "/bin/sh");
        assert_eq!(escape("cpu-integer=100"), "cpu-integer=100");
        assert_eq!(escape("echo \"a b\" 5%"), "echo%20%22a%20b%22%205%25");
        assert_eq!([escape(""), escape("--"), escape("é")], ["%00", "%2d%2d", "%c3%a9"]);
    }

    #[test]
    fn the_program_is_static_and_loads_where_it_was_linked() {
        // ELF: e_type is ET_EXEC, and there is no interpreter.
        assert_eq!((&PROGRAM[..4], &PROGRAM[16..18]), (&b"\x7fELF"[..], &[2, 0][..]));
        assert!(!PROGRAM.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }
}
