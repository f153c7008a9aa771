//! The commands of `husk oci` that a shim runs as processes of their own, as any engine does.
//!
//! What starts or ends processes runs there: it forks, enters namespaces, changes this process's signals and directories, and waits for its
//! children, which is for a process with one thread. What only talks to a machine is called as a function (`service.rs`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::children::Children;
use super::place::Place;
use super::streams::{self, Paths, Screen};
use crate::sys::process;
use crate::sys::socket::{self, receive_with_fd_over};

/// Whoever runs commands.
#[derive(Debug)]
pub struct Runtime {
    pub place: Place,
    pub children: Arc<Children>,
    /// The number of files that were needed for a moment.
    files: AtomicU64,
}

/// A process of a container that was started.
pub struct Begun {
    /// That of the process on the host that stands for it.
    pub pid: u32,
    /// What keeps its input open.
    pub input: Option<File>,
    /// The outer end of its terminal, and what that prints.
    pub terminal: Option<(File, Screen)>,
}

/// A file in a bundle for a moment.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Runtime {
    pub fn new(place: Place, children: Arc<Children>) -> Runtime {
        Runtime { place, children, files: AtomicU64::new(0) }
    }

    /// Creates the container `id`, whose process waits.
    pub fn create(&self, id: &str, bundle: &Path, systemd_cgroup: bool, paths: &Paths) -> Result<Begun> {
        let flags = systemd_cgroup.then_some("--systemd-cgroup");
        let words = flags.into_iter().chain(["create", "--bundle"]).map(OsString::from).chain([bundle.into()]);
        self.begin(bundle, words.collect(), &[id.into()], paths)
    }

    /// Starts one more process, which `spec` describes, in the container `id`.
    pub fn exec(&self, id: &str, bundle: &Path, spec: &[u8], paths: &Paths) -> Result<Begun> {
        let described = self.temporary(bundle, "process");
        fs::write(&described.0, spec).with_context(|| format!("write {}", described.0.display()))?;
        let words = ["exec".into(), "--detach".into(), "--process".into(), described.0.clone().into()];
        self.begin(bundle, words.into(), &[id.into()], paths)
    }

    /// Changes the limits of the container `id` to `limits`, as in `linux.resources` (JSON).
    pub fn update(&self, id: &str, bundle: &Path, limits: &[u8]) -> Result<()> {
        let described = self.temporary(bundle, "limits");
        fs::write(&described.0, limits).with_context(|| format!("write {}", described.0.display()))?;
        self.run(bundle, &["update".as_ref(), "--resources".as_ref(), described.0.as_os_str(), id.as_ref()], None)
    }

    /// Starts a process with streams; `words` are followed by what tells of it.
    fn begin(&self, bundle: &Path, mut words: Vec<OsString>, last: &[OsString], paths: &Paths) -> Result<Begun> {
        let pid_file = self.temporary(bundle, "pid");
        words.extend(["--pid-file".into(), pid_file.0.clone().into()]);
        let (input, terminal) = if paths.terminal {
            let outer = self.begin_with_terminal(bundle, words, last)?;
            let (input, screen) = streams::attend(&outer, paths)?;
            (input, Some((outer, screen)))
        } else {
            let opened = streams::open(paths)?;
            words.extend_from_slice(last);
            self.run(bundle, &words, Some(opened.streams))?;
            (opened.input, None)
        };
        let text = fs::read_to_string(&pid_file.0).with_context(|| format!("read {}", pid_file.0.display()))?;
        Ok(Begun { pid: text.trim().parse().context("the PID of the process")?, input, terminal })
    }

    fn begin_with_terminal(&self, bundle: &Path, mut words: Vec<OsString>, last: &[OsString]) -> Result<File> {
        let socket = Temporary(self.place.further(self.files.fetch_add(1, Ordering::Relaxed)));
        let what = || format!("listen at {}", socket.0.display());
        // Left by a shim of the same name that was killed.
        let _ = fs::remove_file(&socket.0);
        let listener: UnixListener = socket::listen(&socket.0, 0o600).with_context(what)?;
        words.extend(["--console-socket".into(), socket.0.clone().into()]);
        words.extend_from_slice(last);
        self.run(bundle, &words, None)?;
        // It was sent before the command has ended.
        let (stream, _) = listener.accept().context("the terminal has not been sent")?;
        let (_, outer) = receive_with_fd_over(&stream, &mut [0; 256]).context("receive the terminal")?;
        Ok(outer.context("no terminal has been sent")?.into())
    }

    /// Runs a command about a container, whose bundle is `bundle`.
    pub fn run(&self, bundle: &Path, words: &[impl AsRef<OsStr>], streams: Option<[Stdio; 3]>) -> Result<()> {
        let log = self.temporary(bundle, "log");
        let mut command = command(&self.place.root, &log.0, words);
        if let Some([stdin, stdout, stderr]) = streams {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        let code = self.children.run(&mut command)?;
        explain(code, &log.0)
    }

    fn temporary(&self, bundle: &Path, what: &str) -> Temporary {
        Temporary(bundle.join(format!("husk-{what}.{}", self.files.fetch_add(1, Ordering::Relaxed))))
    }
}

/// `husk oci` with `words`, and no streams.
fn command(root: &Path, log: &Path, words: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("husk")
        .arg("oci")
        .arg("--root")
        .arg(root)
        .arg("--log")
        .arg(log)
        .args(["--log-format", "json"])
        .args(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // This process blocks some.
    process::reset_signals(&mut command);
    command
}

/// Deletes the container `id`, for a shim that is gone.
pub fn delete(root: &Path, bundle: &Path, id: &str) -> Result<()> {
    let log = Temporary(bundle.join("husk-log.delete"));
    let status = command(root, &log.0, &["delete", "--force", id]).status().context("start husk")?;
    explain(status.code().map_or(1, i32::unsigned_abs), &log.0)
}

/// The reason that a command has written to its log before it has failed.
fn explain(code: u32, log: &Path) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let text = match fs::read_to_string(log) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).context("read the log of husk oci"),
        read => read.unwrap_or_default(),
    };
    let told = text
        .lines()
        .last()
        .and_then(|line| Some(serde_json::from_str::<Value>(line).ok()?["msg"].as_str()?.to_owned()));
    ensure!(told.is_some(), "husk oci has ended with exit code {code}");
    bail!(told.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_explained_by_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        explain(0, &log).unwrap();
        assert_eq!(explain(3, &log).unwrap_err().to_string(), "husk oci has ended with exit code 3");
        fs::write(&log, "{\"msg\":\"first\"}\n{\"msg\":\"no such program\"}\n").unwrap();
        assert_eq!(explain(1, &log).unwrap_err().to_string(), "no such program");
    }
}
