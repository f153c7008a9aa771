//! What the tests of engines with a daemon have in common.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::{Runtime, await_that, finish};

/// The name of the image that [`archive`] makes.
pub const IMAGE: &str = "docker.io/library/box:latest";

/// Whether all of these programs are there; says so if not.
pub fn are_there(programs: &[&str]) -> bool {
    let is_there = |program: &&&str| finish(Command::new("sh").args(["-c", "command -v $0", program])).code == Some(0);
    let missing = programs.iter().find(|program| !is_there(program));
    if let Some(missing) = missing {
        eprintln!("SKIPPED: no {missing}; `scripts/test guests` runs this in the lab");
    }
    missing.is_none()
}

/// A daemon, which is stopped when it is dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon that finds husk's kernels, and whose log is `log` in the test's directory.
    pub fn start(runtime: &Runtime, command: &mut Command, log: &str) -> Daemon {
        let guests = runtime.kernel.parent().unwrap().parent().unwrap();
        fs::create_dir_all(runtime.path("cache")).unwrap();
        let _ = symlink(guests, runtime.path("cache/kernels"));
        let log = runtime.path(log);
        let file = File::create(&log).unwrap();
        // Of the environment, only what an init gives, and where husk's shim is.
        let path = format!("{}:{}", runtime.dir.path().display(), std::env::var("PATH").unwrap());
        command.env_clear().env("PATH", path).env("HUSK_CACHE", runtime.path("cache"));
        command.env("TMPDIR", runtime.dir.path());
        let child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Daemon { child, log }
    }

    /// Waits until a command of the daemon's client succeeds.
    #[track_caller]
    pub fn await_answer(&mut self, is_there: impl Fn() -> bool) {
        await_that(|| is_there() || self.child.try_wait().unwrap().is_some(), || "no answer of the daemon".into());
        assert_eq!(self.child.try_wait().unwrap(), None, "the daemon has ended");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
        if std::thread::panicking() {
            // Why the test has failed.
            eprintln!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// An archive as of `docker save` with the root file system of the test, whose image is [`IMAGE`].
pub fn archive(runtime: &Runtime) -> PathBuf {
    let dir = runtime.path("image");
    fs::create_dir(&dir).unwrap();
    tar(&dir.join("layer.tar"), &runtime.path("rootfs"));
    let digest = finish(Command::new("sha256sum").arg(dir.join("layer.tar")));
    let digest = format!("sha256:{}", digest.expect(0).split(' ').next().unwrap());
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest] },
        "config": { "Env": ["PATH=/bin"], "Cmd": ["sleep", "100000"] },
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let manifest = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = runtime.path("image.tar");
    tar(&archive, &dir);
    archive
}

fn tar(archive: &Path, dir: &Path) {
    finish(Command::new("tar").arg("cf").arg(archive).arg("-C").arg(dir).arg(".")).expect(0);
}

/// Kills the daemon, which leaves what it has started.
impl Daemon {
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The cgroup of an engine's containers, named like the test's directory.
pub fn cgroup_of(runtime: &Runtime) -> String {
    format!("/husk-{}", runtime.dir.path().file_name().unwrap().display())
}

/// An engine's own cgroup may be left, empty, and is removed.
#[track_caller]
pub fn expect_no_cgroups_in(parent: &str) {
    let parent = Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/'));
    let entries = fs::read_dir(&parent).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    let left: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let _ = fs::remove_dir(&parent);
}
