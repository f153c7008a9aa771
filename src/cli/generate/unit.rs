//! The text of a systemd unit.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display, Formatter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// How much longer than a stop the end of a machine may take.
const MARGIN_SECONDS: u32 = 60;

/// A unit that runs a machine in the foreground.
#[derive(Debug)]
pub(super) struct Unit {
    /// The machine's name or ID.
    pub machine: String,
    /// The path of husk.
    pub husk: PathBuf,
    /// The working directory, if it matters.
    pub working_dir: Option<PathBuf>,
    /// The arguments that run it.
    pub start: Vec<OsString>,
    /// Whether they make it anew.
    pub is_new: bool,
    /// The time that it has to stop.
    pub stop_seconds: u32,
    /// When systemd restarts it.
    pub restart: String,
    /// `$XDG_RUNTIME_DIR`, which leads to the machine.
    pub runtime_dir: Option<PathBuf>,
    /// Whether the unit is the system's and not a user's.
    pub is_root: bool,
    /// Variables that say where the user's data is.
    pub variables: Vec<(String, OsString)>,
}

impl Display for Unit {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Unit { machine, stop_seconds, restart, .. } = self;
        // The path of a command and values of variables know no other variables.
        let husk = escaped(self.husk.as_os_str(), b"%");
        writeln!(f, "# husk-{machine}.service: written by `husk generate systemd`\n")?;
        writeln!(f, "[Unit]\nDescription=husk machine {machine}")?;
        writeln!(f, "Wants=network-online.target\nAfter=network-online.target")?;
        if let Some(service) = self.runtime_service() {
            writeln!(f, "Requires={service}\nAfter={service}")?;
        }
        writeln!(f, "\n[Service]\nType=notify")?;
        if let Some(dir) = &self.working_dir {
            writeln!(f, "WorkingDirectory={}", dir.display().to_string().replace('%', "%%"))?;
        }
        if let Some(dir) = self.runtime_dir.as_ref().filter(|_| self.is_root) {
            writeln!(f, "Environment={}", escaped(&assigned("XDG_RUNTIME_DIR", dir.as_os_str()), b"%"))?;
        }
        for (name, value) in &self.variables {
            writeln!(f, "Environment={}", escaped(&assigned(name, value), b"%"))?;
        }
        if self.is_new {
            writeln!(f, "ExecStartPre={husk} rm -f {machine}")?;
        }
        let words: Vec<String> = self.start.iter().map(|word| quoted(word)).collect();
        writeln!(f, "ExecStart={husk} {}", words.join(" "))?;
        writeln!(f, "ExecStop={husk} stop -t {stop_seconds} {machine}")?;
        writeln!(f, "TimeoutStopSec={}", stop_seconds.saturating_add(MARGIN_SECONDS))?;
        // What a process leaves that was stopped by the signal or by force.
        writeln!(f, "SuccessExitStatus=143 137\nRestart={restart}")?;
        let target = if self.is_root { "multi-user.target" } else { "default.target" };
        writeln!(f, "\n[Install]\nWantedBy={target}")
    }
}

impl Unit {
    /// The service that provides the runtime directory, which otherwise exists only while its user is logged in.
    fn runtime_service(&self) -> Option<String> {
        let user = self.runtime_dir.as_ref().filter(|_| self.is_root)?.strip_prefix("/run/user").ok()?.to_str()?;
        user.parse::<u32>().ok().map(|user| format!("user-runtime-dir@{user}.service"))
    }
}

fn assigned(name: &str, value: &OsStr) -> OsString {
    let mut text = OsString::from(name);
    text.push("=");
    text.push(value);
    text
}

/// Fails unless a unit can name this path where quotes and escapes have no meaning.
pub(super) fn check_plain(path: &Path) -> Result<()> {
    let is_plain = |text: &str| text.trim() == text && !text.ends_with('\\') && !text.contains(char::is_control);
    ensure!(path.to_str().is_some_and(is_plain), "systemd has no way to write the path {path:?}: leave out --new");
    Ok(())
}

/// An argument of a command: without meaning for systemd, whatever its bytes.
fn quoted(word: &OsStr) -> String {
    escaped(word, b"%$")
}

/// A word without meaning for systemd. The bytes in `doubled` would begin something that is replaced.
fn escaped(word: &OsStr, doubled: &[u8]) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=,@+".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(is_plain) {
        return word.to_string_lossy().into_owned();
    }
    let mut text = String::from("\"");
    for byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(*byte)]),
            byte if doubled.contains(byte) => text.extend([char::from(*byte); 2]),
            b' '..=b'~' => text.push(char::from(*byte)),
            _ => drop(write!(text, "\\x{byte:02x}")),
        }
    }
    text + "\""
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStringExt;
    use std::process::Command;

    use super::*;

    fn unit() -> Unit {
        let words = ["run", "--rm", "--name=web", "-e", "A=1 $x %y \"z\"", "debian"].map(OsString::from);
        Unit {
            machine: "web".into(),
            husk: "/bin/true".into(),
            working_dir: Some("/tmp".into()),
            start: words.into_iter().chain([OsString::from_vec(vec![0xff, b'\n'])]).collect(),
            is_new: true,
            stop_seconds: 10,
            restart: "on-failure".into(),
            runtime_dir: Some("/run/user/0".into()),
            is_root: true,
            variables: vec![("HUSK_DATA".into(), "/srv/my $data %n".into())],
        }
    }

    #[test]
    fn a_word_is_one_argument_for_systemd() {
        for (word, expected) in [
            ("plain-1.2/x:y=z", "plain-1.2/x:y=z"),
            ("two words", "\"two words\""),
            ("100%", "\"100%%\""),
            ("$HOME", "\"$$HOME\""),
            ("a\"b\\c\n", "\"a\\\"b\\\\c\\x0a\""),
            ("", "\"\""),
            (";", "\";\""),
        ] {
            assert_eq!(quoted(word.as_ref()), expected);
        }
    }

    #[test]
    fn a_path_that_would_begin_another_setting_is_refused() {
        check_plain(Path::new("/srv/my $data %n é")).unwrap();
        for path in [&b"/a\nExecStartPre=/bin/id"[..], b"/a\\", b"/a ", b"/\xff", b"/a\r"] {
            assert!(check_plain(Path::new(OsStr::from_bytes(path))).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_unit_says_how_the_machine_is_run() {
        let text = unit().to_string();
        for line in [
            "Requires=user-runtime-dir@0.service",
            "Environment=XDG_RUNTIME_DIR=/run/user/0",
            "Environment=\"HUSK_DATA=/srv/my $data %%n\"",
            "ExecStartPre=/bin/true rm -f web",
            r#"ExecStart=/bin/true run --rm --name=web -e "A=1 $$x %%y \"z\"" debian "\xff\x0a""#,
            "ExecStop=/bin/true stop -t 10 web",
            "TimeoutStopSec=70",
            "WantedBy=multi-user.target",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let of_user = Unit { is_root: false, is_new: false, ..unit() }.to_string();
        assert!(
            !of_user.contains("XDG_RUNTIME_DIR") && !of_user.contains("Pre=") && of_user.contains("default.target")
        );
    }

    #[test]
    fn systemd_accepts_a_unit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("husk-web.service");
        for unit in [unit(), Unit { is_root: false, is_new: false, working_dir: None, ..unit() }] {
            fs::write(&path, unit.to_string()).unwrap();
            let output = match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
                Err(error) => return eprintln!("SKIPPED: systemd-analyze cannot be run: {error}"),
                Ok(output) => output,
            };
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !errors.contains("husk-web.service"), "{errors}\n{unit}");
        }
    }
}
