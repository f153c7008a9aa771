//! containerd with husk as its runtime, driven by ctr.

use std::fs;
use std::process::Command;

use crate::engine::{Daemon, IMAGE, archive, are_there, expect_no_cgroups_in};
use crate::{Ended, Runtime, await_that, finish, runtime};

/// The configuration of a containerd that does not listen for Kubernetes.
pub const WITHOUT_PODS: &str = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]";

/// containerd with directories and a socket of its own, so that it touches nothing of the host's.
pub struct Containerd {
    _daemon: Daemon,
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
        let mut daemon =
            Daemon::start(&runtime, Command::new("containerd").arg("--config").arg(config), "containerd.log");
        daemon.await_answer(|| finish(ctr(&runtime, namespace).arg("version")).code == Some(0));
        let containerd = Containerd { _daemon: daemon, namespace: namespace.into(), runtime };
        containerd.ctr(&["image", "import", archive(&containerd.runtime).to_str().unwrap()]).expect(0);
        containerd
    }

    fn ctr(&self, words: &[&str]) -> Ended {
        finish(ctr(&self.runtime, &self.namespace).args(words))
    }

    /// `ctr run` with these flags.
    fn run(&self, flags: &[&str], id: &str, words: &[&str]) -> Ended {
        let place = |name: &str| self.runtime.path(name).display().to_string();
        let (binary, state) = (place("husk-oci"), place("state"));
        let own = ["run", "--runc-binary", &binary, "--runc-root", &state, "--fifo-dir", &place("fifo")];
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
    let runtime = runtime!();
    if !are_there(&["containerd", "containerd-shim-runc-v2", "ctr"]) {
        return;
    }
    let namespace = format!("husk-test-{}", std::process::id());
    let containerd = Containerd::start(runtime, WITHOUT_PODS, &namespace);
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
    containerd.ctr(&["task", "kill", "--signal", "SIGTERM", "c"]).expect(0);
    await_that(|| status(&containerd, "c") == "STOPPED", || status(&containerd, "c"));
    let deleted = containerd.ctr(&["task", "rm", "c"]);
    deleted.expect(0);
    assert!(deleted.errors.contains("non-zero exit code 4"), "{}", deleted.errors);
    containerd.ctr(&["container", "rm", "c"]).expect(0);
    leaves_nothing(&containerd);
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

fn status(containerd: &Containerd, id: &str) -> String {
    let list = containerd.ctr(&["task", "ls"]);
    let line = list.expect(0).lines().find(|line| line.split_whitespace().next() == Some(id)).map(str::to_owned);
    line.and_then(|line| line.split_whitespace().nth(2).map(str::to_owned)).unwrap_or_default()
}

fn leaves_nothing(containerd: &Containerd) {
    assert_eq!(containerd.ctr(&["task", "ls", "-q"]).expect(0), "");
    containerd.runtime.nothing_is_left_in(&containerd.runtime.path("state").join(&containerd.namespace));
    expect_no_cgroups_in(&containerd.namespace);
}
