//! Detection of a contender's program and its version.

use std::process::Command;

use super::super::report::{self, Isolation, Unavailable};
use crate::foreign::one_line;
use crate::resources::{self, host, programs};

/// A timeout, because some clients wait forever for a hung daemon.
const ANSWERS_WITHIN_S: &str = "10";

/// Checks that this host can run ordinary guest kernels, and how to enable that if not.
pub fn kvm() -> Result<(), Unavailable> {
    let missing = |reason: String| Unavailable { reason, install: Some("husk doctor".to_owned()) };
    if host::runs_only_pvm_guests() {
        return Err(missing("this host's KVM is PVM, which runs only kernels with PVM support".to_owned()));
    }
    resources::open_kvm().map(drop).map_err(|error| missing(format!("{error:#}")))
}

/// A program, or why it is unavailable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The version.
    pub version: Result<String, Unavailable>,
}

impl Program {
    /// Queries the version of a program. `install` is the hint shown if that fails.
    pub fn find(name: &str, arguments: &[&str], install: &str) -> Program {
        let mut words = vec![ANSWERS_WITHIN_S, name];
        words.extend(arguments);
        let version = match which(name) {
            false => Err(format!("{name} is not installed")),
            true => match programs::output("timeout", &words) {
                Ok(text) => version(&text).ok_or_else(|| format!("{name} does not report its version")),
                Err(error) => Err(one_line(format!("{error:#}").trim_start_matches("timeout 10 "))),
            },
        };
        Program { version: version.map_err(|reason| Unavailable { reason, install: Some(install.to_owned()) }) }
    }

    /// A program that cannot be used.
    pub fn missing(reason: &str, install: Option<&str>) -> Program {
        Program { version: Err(Unavailable { reason: reason.to_owned(), install: install.map(str::to_owned) }) }
    }

    /// Describes the contender for the report.
    pub fn describe(
        &self,
        name: &str,
        isolation: Isolation,
        command_line: Vec<String>,
        notes: Vec<String>,
    ) -> report::ContenderInfo {
        let unavailable = self.version.clone().err();
        let is_there = unavailable.is_none();
        report::ContenderInfo {
            name: name.to_owned(),
            isolation,
            version: self.version.clone().ok(),
            kernel: None,
            unavailable,
            command_line: if is_there { command_line } else { Vec::new() },
            notes: if is_there { notes } else { Vec::new() },
        }
    }
}

/// Returns the major number of a version, or 0 if it does not start with a number.
pub fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default()
}

/// Whether a program is on the path.
pub fn which(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Whether a command succeeds. A missing program counts as failure.
pub fn succeeds(name: &str, arguments: &[&str]) -> bool {
    Command::new(name).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Returns the first word that looks like a version, without a leading `v`.
fn version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| !line.trim().is_empty())?;
    let is_version = |word: &&str| word.trim_start_matches('v').starts_with(|first: char| first.is_ascii_digit());
    let word = line.split_whitespace().find(is_version).unwrap_or(line.trim());
    Some(word.trim_start_matches('v').trim_end_matches([',', ')']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed_from_program_output() {
        for (printed, expected) in [
            ("crun version 1.8.1\ncommit: f8a096be060b22ccd3d5f3ebe44108517fbf6c30\nrundir: /run/crun\n", "1.8.1"),
            ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev\n", "1.1.5+ds1"),
            ("podman version 4.3.1\n", "4.3.1"),
            ("bubblewrap 0.8.0\n", "0.8.0"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)\nCopyright (c)\n", "10.0.2"),
            ("\nFirecracker v1.7.0\n\n2024-05-01 [anonymous-instance:main] exiting\n", "1.7.0"),
            ("cloud-hypervisor v39.0.0\n", "39.0.0"),
            ("20.10.24+dfsg1\n", "20.10.24+dfsg1"),
            ("Docker version 20.10.24+dfsg1, build 297e128\n", "20.10.24+dfsg1"),
            ("a thing of its own\n", "a thing of its own"),
        ] {
            assert_eq!(version(printed).as_deref(), Some(expected), "{printed}");
        }
        assert_eq!(version("\n"), None);
    }

    #[test]
    fn a_missing_program_comes_with_installation_instructions() {
        let program = Program::find("husk-no-such-program", &["--version"], "sudo apt-get install it");
        let info = program.describe("it", Isolation::Container, words(), vec!["a note".into()]);
        let unavailable = info.unavailable.unwrap();
        assert_eq!(unavailable.reason, "husk-no-such-program is not installed");
        assert_eq!(unavailable.install.as_deref(), Some("sudo apt-get install it"));
        assert!(info.version.is_none() && info.command_line.is_empty() && info.notes.is_empty());
    }

    #[test]
    fn a_failing_program_is_unavailable_with_its_error() {
        let program = Program::find("ls", &["/husk-no-such-dir"], "fix it");
        let reason = program.version.unwrap_err().reason;
        assert!(reason.contains("No such file") && !reason.contains('\n'), "{reason}");
    }

    fn words() -> Vec<String> {
        vec!["it".to_owned()]
    }
}
