//! The runtime's log file, from which engines take the reason of a failure.

use std::fs::File;
use std::io::Write;
use std::time::SystemTime;

use anyhow::Error;
use serde_json::json;

use super::Flags;

/// The format of a log file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// logfmt
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// Appends an error to the log file, if there is one.
pub fn write(flags: &Flags, error: &Error) {
    let Some(path) = &flags.log else { return };
    let line = line(flags.log_format, &format!("{error:#}"), SystemTime::now());
    let written =
        File::options().append(true).create(true).open(path).and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        log::warn!("write to the log {}: {error}", path.display());
    }
}

fn line(format: Format, message: &str, time: SystemTime) -> String {
    let time = humantime::format_rfc3339_seconds(time).to_string();
    match format {
        Format::Json => format!("{}\n", json!({ "level": "error", "msg": message, "time": time })),
        Format::Text => format!("time={time:?} level=error msg={message:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_line_in_either_format() {
        let entry = |format| line(format, "a \"b\"\nc", SystemTime::UNIX_EPOCH);
        let parsed: serde_json::Value = serde_json::from_str(&entry(Format::Json)).unwrap();
        assert_eq!((&parsed["msg"], &parsed["level"]), (&json!("a \"b\"\nc"), &json!("error")));
        assert_eq!(parsed["time"], "1970-01-01T00:00:00Z");
        for format in [Format::Json, Format::Text] {
            assert_eq!(entry(format).lines().count(), 1, "{}", entry(format));
        }
    }
}
