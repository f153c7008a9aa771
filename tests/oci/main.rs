//! Tests of the OCI runtime: bundles that are driven as an engine drives them, and engines.
//!
//! They need root, KVM that runs stock guests (or the lab), and the kernels in the directory that HUSK_TEST_GUESTS names; those of engines also
//! the engines. Without these they are skipped. The root file system is made here with busybox.

mod containerd;
mod cri;
mod docker;
mod engine;
mod faults;
mod life;
mod network;
mod pod;
mod podman;
mod podman_pod;
mod rootless;
mod shim;
mod upkeep;
mod warm;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything here takes, even emulated on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);
const APPLETS: [&str; 25] = [
    "sh", "ls", "cat", "id", "echo", "sleep", "mount", "ps", "touch", "stat", "hostname", "kill", "tty", "mkdir",
    "grep", "ip", "ping", "nproc", "env", "nc", "printf", "readlink", "true", "test", "stty",
];

/// Starts a test that needs root and guests.
macro_rules! runtime {
    () => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        let Some(guests) = std::env::var_os("HUSK_TEST_GUESTS") else {
            eprintln!("SKIPPED {name}: HUSK_TEST_GUESTS names no guests; `scripts/test guests` runs this");
            return;
        };
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED {name}: not root; `scripts/test guests` runs this");
            return;
        }
        $crate::Runtime::new(guests.as_ref())
    }};
}
pub(crate) use runtime;

/// The runtime under its other name, with a state directory, a root file system and a bundle of its own.
struct Runtime {
    dir: TempDir,
    kernel: PathBuf,
}

/// How a command has ended.
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

impl Ended {
    #[track_caller]
    fn expect(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}\n{}", self.output, self.errors);
        &self.output
    }

    #[track_caller]
    fn fails_with(&self, words: &str) {
        assert_ne!(self.code, Some(0), "{}", self.output);
        assert!(self.errors.contains(words) && self.errors.lines().count() == 1, "{}", self.errors);
    }
}

impl Runtime {
    fn new(guests: &Path) -> Runtime {
        let dir = tempfile::tempdir().unwrap();
        let husk = std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into());
        for name in ["husk-oci", "containerd-shim-husk-v2"] {
            symlink(fs::canonicalize(&husk).unwrap(), dir.path().join(name)).unwrap();
        }
        make_root(&dir.path().join("rootfs"));
        fs::create_dir(dir.path().join("bundle")).unwrap();
        Runtime { dir, kernel: guests.join("micro/vmlinux") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("husk-oci"));
        command.arg("--root").arg(self.path("state")).args(words).current_dir(self.path("bundle"));
        command.stdin(Stdio::null()).env_remove("HOME");
        command
    }

    fn run(&self, words: &[&str]) -> Ended {
        finish(&mut self.command(words))
    }

    /// Writes a configuration that runs a shell script, changed by `edit`.
    fn configure(&self, script: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.path("bundle/config.json");
        let _ = fs::remove_file(&path);
        self.run(&["spec"]).expect(0);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"] = json!({ "path": self.path("rootfs"), "readonly": false });
        config["annotations"] = json!({ "io.husk.kernel": self.kernel });
        edit(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    /// Creates a container, whose output goes to the file `output`.
    fn create(&self, id: &str) -> Ended {
        self.create_with_output(id, "output")
    }

    /// The same with another name for the file.
    fn create_with_output(&self, id: &str, name: &str) -> Ended {
        let output = fs::File::create(self.path(name)).unwrap();
        let mut command = self.command(&["create", "--pid-file", "../pid", id]);
        // As with an engine, the streams are the container's.
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let code = command.status().unwrap().code();
        let printed = fs::read_to_string(self.path(name)).unwrap();
        Ended { code, output: printed.clone(), errors: printed }
    }

    fn output(&self) -> String {
        fs::read_to_string(self.path("output")).unwrap()
    }

    #[track_caller]
    fn await_output(&self, words: &str) {
        await_that(|| self.output().contains(words), || format!("{words} in {}", self.output()));
    }

    fn status(&self, id: &str) -> String {
        let state: Value = serde_json::from_str(self.run(&["state", id]).expect(0)).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn await_status(&self, id: &str, status: &str) {
        await_that(|| self.status(id) == status, || format!("{id} is {}", self.status(id)));
    }

    /// Nothing is left of any container.
    #[track_caller]
    fn expect_nothing_left(&self) {
        assert_eq!(self.run(&["list", "-q"]).expect(0), "");
        self.nothing_is_left_in(&self.path("state"));
    }

    /// Nothing is left of any container whose state was in the directory `own`.
    #[track_caller]
    fn nothing_is_left_in(&self, own: &Path) {
        assert_eq!(fs::read_dir(own).map_or(0, Iterator::count), 0, "files in {}", own.display());
        let is_ours = |pid: &str| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words).contains(own.to_str().unwrap())
        };
        let ours = || -> Vec<String> {
            let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().into_string().ok());
            all.filter(|pid| pid.parse::<u32>().is_ok() && is_ours(pid)).collect()
        };
        await_that(|| ours().is_empty(), || format!("processes {:?} are left", ours()));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(own.to_str().unwrap()), "{mounts}");
    }
}

/// A root file system with busybox.
fn make_root(root: &Path) {
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists()).expect("busybox");
    fs::copy(fs::canonicalize(busybox).unwrap(), root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n").unwrap();
}

#[track_caller]
fn await_that(mut is_so: impl FnMut() -> bool, what: impl FnOnce() -> String) {
    let until = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < until, "{}", what());
        thread::sleep(Duration::from_millis(50));
    }
}

fn finish(command: &mut Command) -> Ended {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), output: text(&output.stdout), errors: text(&output.stderr) }
}
