//! containerd with husk as its runtime, driven by ctr.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use crate::engine::{Daemon, IMAGE, archive, are_there, expect_no_cgroups_in};
use crate::{Ended, Runtime, await_that, finish, runtime};

/// The configuration of a containerd that does not listen for Kubernetes.
pub const WITHOUT_PODS: &str = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]";

/// containerd with directories and a socket of its own, so that it touches nothing of the host's.
pub struct Containerd {
    daemon: Daemon,
    namespace: String,
    pub runtime: Runtime,
}

impl Containerd {
    /// Starts containerd with these lines in its configuration, and imports the image into its namespace.
    pub fn start(runtime: Runtime, lines: &str, namespace: &str) -> Containerd {
        let config = runtime.path("config.toml");
        let place = |name: &str| runtime.path(name).display().to_string();
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n{lines}\n[debug]\nlevel = \"warn\"\n[grpc]\naddress = {:?}\n",
            place("containerd"),
            place("run"),
            place("socket"),
        );
        fs::write(&config, text).unwrap();
        let daemon = Containerd::daemon(&runtime, namespace);
        let containerd = Containerd { daemon, namespace: namespace.into(), runtime };
        containerd.ctr(&["image", "import", archive(&containerd.runtime).to_str().unwrap()]).expect(0);
        containerd
    }

    fn daemon(runtime: &Runtime, namespace: &str) -> Daemon {
        let mut command = Command::new("containerd");
        let mut daemon =
            Daemon::start(runtime, command.arg("--config").arg(runtime.path("config.toml")), "containerd.log");
        daemon.await_answer(|| finish(ctr(runtime, namespace).arg("version")).code == Some(0));
        daemon
    }

    /// Kills containerd, and starts it again.
    fn restart(&mut self) {
        self.daemon.kill();
        self.daemon = Containerd::daemon(&self.runtime, &self.namespace);
    }

    /// What is known of husk's containers of containerd's namespace, whose shim is husk's.
    pub fn root(&self) -> PathBuf {
        self.runtime.path("run/husk").join(&self.namespace)
    }

    /// Nothing is left of husk's shims and their containers.
    #[track_caller]
    pub fn leaves_nothing(&self) {
        let sockets = self.runtime.path("run/husk/.shims");
        let count = || fs::read_dir(&sockets).map_or(0, Iterator::count);
        await_that(|| count() == 0, || format!("sockets in {}", sockets.display()));
        self.runtime.nothing_is_left_in(&self.root());
        self.runtime.nothing_is_left_in(&self.runtime.path("run/io.containerd.runtime.v2.task").join(&self.namespace));
    }

    fn ctr(&self, words: &[&str]) -> Ended {
        finish(ctr(&self.runtime, &self.namespace).args(words))
    }

    /// `ctr run` with these flags.
    fn run(&self, flags: &[&str], id: &str, words: &[&str]) -> Ended {
        let fifos = self.runtime.path("fifo").display().to_string();
        let own = ["run", "--runtime", "io.containerd.husk.v2", "--fifo-dir", &fifos];
        self.ctr(&[&own[..], flags, &[IMAGE, id], words].concat())
    }
}

fn ctr(runtime: &Runtime, namespace: &str) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(runtime.path("socket")).args(["--namespace", namespace]);
    command
}

#[test]
fn containerd_runs_containers_in_machines() {
    let Some(mut containerd) = start(runtime!()) else { return };
    let ended = containerd.run(&["--rm"], "once", &["sh", "-c", "cat /proc/sys/kernel/osrelease; echo e >&2; exit 5"]);
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(ended.expect(5) != own, "{}", ended.output);
    assert!(ended.errors.contains("e\n"), "{}", ended.errors);
    let ended = containerd.run(&["--rm"], "none", &["no-such-program"]);
    assert!(ended.code != Some(0) && ended.errors.contains("executable file not found in $PATH"), "{}", ended.errors);

    let log = containerd.runtime.path("log");
    let output = format!("file://{}", log.display());
    let limits = ["--detach", "--log-uri", &output, "--memory-limit", "134217728", "--env", "A=b"];
    let script = "trap 'exit 4' TERM; echo up $A; while :; do sleep 0.1; done";
    containerd.run(&limits, "c", &["sh", "-c", script]).expect(0);
    await_that(|| fs::read_to_string(&log).is_ok_and(|text| text == "up b\n"), || "no output".into());
    is_driven(&containerd);
    // The shim and its container go on without containerd, which finds them again.
    containerd.restart();
    assert_eq!(status(&containerd, "c"), "RUNNING");
    containerd.ctr(&["task", "kill", "--signal", "SIGTERM", "c"]).expect(0);
    await_that(|| status(&containerd, "c") == "STOPPED", || status(&containerd, "c"));
    let deleted = containerd.ctr(&["task", "rm", "c"]);
    deleted.expect(0);
    assert!(deleted.errors.contains("non-zero exit code 4"), "{}", deleted.errors);
    containerd.ctr(&["container", "rm", "c"]).expect(0);
    is_removed_without_its_shim(&containerd);
    assert_eq!(containerd.ctr(&["task", "ls", "-q"]).expect(0), "");
    containerd.leaves_nothing();
    expect_no_cgroups_in(&containerd.namespace);
}

/// containerd in a namespace that no other test has, if it is there.
fn start(runtime: Runtime) -> Option<Containerd> {
    let namespace = format!("husk-test-{}", std::process::id());
    let is_there = are_there(&["containerd", "containerd-shim-runc-v2", "ctr"]);
    is_there.then(|| Containerd::start(runtime, WITHOUT_PODS, &namespace))
}

/// What ctr does with a container that runs.
fn is_driven(containerd: &Containerd) {
    let exec = |id: &str, script: &str| containerd.ctr(&["task", "exec", "--exec-id", id, "c", "sh", "-c", script]);
    assert_eq!(exec("one", "echo $A; exit 7").expect(7), "b\n");
    let ps = containerd.ctr(&["task", "ps", "c"]);
    assert!(ps.expect(0).lines().count() > 1, "{}", ps.output);
    containerd.ctr(&["task", "pause", "c"]).expect(0);
    assert_eq!(status(containerd, "c"), "PAUSED");
    containerd.ctr(&["task", "resume", "c"]).expect(0);
    assert_eq!(status(containerd, "c"), "RUNNING");
    let metrics = containerd.ctr(&["task", "metrics", "c"]);
    assert!(metrics.expect(0).contains("memory.usage"), "{}", metrics.output);
}

/// If a shim is killed, containerd has its container removed.
fn is_removed_without_its_shim(containerd: &Containerd) {
    containerd.run(&["--detach", "--null-io"], "orphan", &["sleep", "1000"]).expect(0);
    let own = containerd.runtime.path("run").display().to_string();
    let is_shim = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        words.starts_with("containerd-shim-husk-v2") && words.contains(&own)
    };
    let names = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let shims: Vec<u32> = names.filter(is_shim).collect();
    let [shim] = shims[..] else { panic!("shims: {shims:?}") };
    let shim = Pid::from_raw(shim.cast_signed()).unwrap();
    kill_process(shim, Signal::KILL).unwrap();
    await_that(|| status(containerd, "orphan") != "RUNNING", || status(containerd, "orphan"));
    containerd.ctr(&["task", "rm", "--force", "orphan"]);
    containerd.ctr(&["container", "rm", "orphan"]).expect(0);
}

fn status(containerd: &Containerd, id: &str) -> String {
    let list = containerd.ctr(&["task", "ls"]);
    let line = list.expect(0).lines().find(|line| line.split_whitespace().next() == Some(id)).map(str::to_owned);
    line.and_then(|line| line.split_whitespace().nth(2).map(str::to_owned)).unwrap_or_default()
}

#[test]
fn containerds_own_shim_runs_husk_oci() {
    let Some(containerd) = start(runtime!()) else { return };
    let place = |name: &str| containerd.runtime.path(name).display().to_string();
    let (binary, state, fifos) = (place("husk-oci"), place("state"), place("fifo"));
    let flags = ["run", "--rm", "--runc-binary", &binary, "--runc-root", &state, "--fifo-dir", &fifos];
    let ended = containerd.ctr(&[&flags[..], &[IMAGE, "c", "sh", "-c", "echo hello; exit 5"]].concat());
    assert_eq!(ended.expect(5), "hello\n");
    containerd.runtime.nothing_is_left_in(&containerd.runtime.path("state").join(&containerd.namespace));
    expect_no_cgroups_in(&containerd.namespace);
}
