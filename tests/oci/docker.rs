//! Docker with husk as its runtime.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::containerd::{Containerd, WITHOUT_PODS};
use crate::engine::{Daemon, are_there, cgroup_of, expect_no_cgroups_in};
use crate::{Ended, Runtime, await_that, finish, runtime};

/// Docker with directories and a socket of its own, so that it touches nothing of the host's.
struct Docker {
    _daemon: Daemon,
    containerd: Containerd,
}

impl Docker {
    fn start(runtime: Runtime) -> Docker {
        let containerd = Containerd::start(runtime, WITHOUT_PODS, "moby");
        let runtime = &containerd.runtime;
        let config = json!({
            "data-root": runtime.path("docker"), "exec-root": runtime.path("exec"),
            "pidfile": runtime.path("docker.pid"), "hosts": [host(runtime)],
            "containerd": runtime.path("socket"), "cgroup-parent": cgroup_of(runtime), "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "runtimes": { "husk": { "path": runtime.path("husk-oci") } }, "default-runtime": "husk",
            "bridge": "none", "iptables": false, "ip-forward": false, "userland-proxy": false, "log-level": "warn",
        });
        let file = runtime.path("daemon.json");
        fs::write(&file, config.to_string()).unwrap();
        let mut daemon = Daemon::start(runtime, Command::new("dockerd").arg("--config-file").arg(file), "docker.log");
        daemon.await_answer(|| finish(&mut command(runtime, &["version"])).code == Some(0));
        let docker = Docker { _daemon: daemon, containerd };
        docker.run(&["load", "--input", docker.runtime().path("image.tar").to_str().unwrap()]).expect(0);
        docker
    }

    fn runtime(&self) -> &Runtime {
        &self.containerd.runtime
    }

    fn run(&self, words: &[&str]) -> Ended {
        finish(command(self.runtime(), words).stdin(Stdio::null()))
    }

    /// `docker run` with these flags and this script.
    fn shell(&self, flags: &[&str], script: &str) -> Ended {
        self.run(&[&["run"], flags, &["box", "sh", "-c", script]].concat())
    }

    fn inspect(&self, name: &str, format: &str) -> String {
        self.run(&["inspect", "--format", format, name]).expect(0).trim().to_owned()
    }
}

fn command(runtime: &Runtime, words: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(["--host", &host(runtime)]).args(words).env("DOCKER_CONFIG", runtime.path("home"));
    command
}

fn host(runtime: &Runtime) -> String {
    format!("unix://{}", runtime.path("docker.sock").display())
}

#[test]
fn docker_runs_containers_in_machines() {
    let runtime = runtime!();
    // dockerd does not start without runc, also if it has another default.
    if !are_there(&["containerd", "containerd-shim-runc-v2", "ctr", "dockerd", "docker", "runc"]) {
        return;
    }
    let docker = Docker::start(runtime);
    runs_once(&docker);
    let script = "trap 'exit 4' TERM; echo up $1; while :; do sleep 0.1; done";
    docker.shell(&["--detach", "--name", "web", "--env", "A=b"], script).expect(0);
    await_that(|| docker.run(&["logs", "web"]).output == "up\n", || docker.run(&["logs", "web"]).output);
    is_driven(&docker);
    copies(&docker);
    docker.run(&["stop", "--time", "60", "web"]).expect(0);
    assert_eq!(docker.inspect("web", "{{.State.Status}} {{.State.ExitCode}}"), "exited 4");
    docker.run(&["start", "web"]).expect(0);
    docker.run(&["kill", "--signal", "KILL", "web"]).expect(0);
    docker.run(&["wait", "web"]).expect(0);
    assert_eq!(docker.inspect("web", "{{.State.Status}} {{.State.ExitCode}}"), "exited 137");
    docker.run(&["rm", "web"]).expect(0);
    reach_each_other(&docker);
    leaves_nothing(&docker);
}

fn runs_once(docker: &Docker) {
    let data = docker.runtime().path("data");
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let flags = ["--rm", "--memory", "128m", "--volume", &volume, "--env", "A=b", "--hostname", "hh", "--read-only"];
    let script = "cat /proc/sys/kernel/osrelease; hostname; echo $A; echo made >/data/made; touch /x; \
                  grep -e MemTotal /proc/meminfo; grep Seccomp: /proc/self/status; exit 5";
    let ended = docker.shell(&flags, script);
    let printed = ended.expect(5);
    assert!(ended.errors.contains("/x: Read-only file system"), "{}", ended.errors);
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(!printed.starts_with(&own) && printed.contains("\nhh\nb\n"), "{printed}");
    assert!(printed.contains("Seccomp:\t2"), "{printed}");
    let memory = printed.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let memory: u32 = memory.trim_end_matches("kB").trim().parse().unwrap();
    assert!((100 << 10..160 << 10).contains(&memory), "{memory} KiB");
    assert_eq!(fs::read_to_string(data.join("made")).unwrap(), "made\n");

    let mut interactive = command(docker.runtime(), &["run", "--rm", "--interactive", "box", "cat"]);
    let mut child = interactive.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"words\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == b"words\n", "{output:?}");

    let ended = docker.run(&["run", "--rm", "box", "no-such-program"]);
    assert_eq!(ended.code, Some(127), "{}", ended.errors);
    assert!(ended.errors.contains("executable file not found in $PATH"), "{}", ended.errors);
}

/// What Docker does with a container that runs.
fn is_driven(docker: &Docker) {
    assert_eq!(
        docker.run(&["exec", "--user", "1000", "web", "sh", "-c", "id -u; echo $A; exit 7"]).expect(7),
        "1000\nb\n"
    );
    assert_eq!(docker.run(&["exec", "--tty", "web", "tty"]).expect(0), "/dev/pts/0\r\n");
    let stats = docker.run(&["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", "web"]);
    assert!(stats.expect(0).starts_with("web ") && !stats.output.starts_with("web 0B"), "{}", stats.output);
    docker.run(&["pause", "web"]).expect(0);
    assert_eq!(docker.inspect("web", "{{.State.Status}}"), "paused");
    docker.run(&["unpause", "web"]).expect(0);
    assert_eq!(docker.inspect("web", "{{.State.Status}}"), "running");
}

fn copies(docker: &Docker) {
    let here = docker.runtime().path("copied");
    fs::write(&here, "to the container").unwrap();
    docker.run(&["cp", here.to_str().unwrap(), "web:/root/copied"]).expect(0);
    assert_eq!(docker.run(&["exec", "web", "cat", "/root/copied"]).expect(0), "to the container");
    docker.run(&["exec", "web", "sh", "-c", "echo from the container >/root/made"]).expect(0);
    docker.run(&["cp", "web:/root/made", here.to_str().unwrap()]).expect(0);
    assert_eq!(fs::read_to_string(here).unwrap(), "from the container\n");
}

/// Containers of a network, whose bridge only the lab gets.
fn reach_each_other(docker: &Docker) {
    if !Path::new("/opt/ip").exists() {
        return;
    }
    docker.run(&["network", "create", "--subnet", "10.78.0.0/24", "net"]).expect(0);
    let network = ["--network", "net"];
    let server = [&network[..], &["--detach", "--name", "server", "--ip", "10.78.0.5"]].concat();
    docker.shell(&server, "echo hello | nc -l -p 80").expect(0);
    let client = [&network[..], &["--rm"]].concat();
    let script = "until nc -w 30 10.78.0.5 80 </dev/null | grep hello; do sleep 0.2; done";
    assert_eq!(docker.shell(&client, script).expect(0), "hello\n");
    docker.run(&["rm", "--force", "server"]).expect(0);
    docker.run(&["network", "rm", "net"]).expect(0);
}

fn leaves_nothing(docker: &Docker) {
    assert_eq!(docker.run(&["ps", "--all", "--quiet"]).expect(0), "");
    docker.runtime().nothing_is_left_in(&docker.runtime().path("exec/runtime-husk/moby"));
    expect_no_cgroups_in(&cgroup_of(docker.runtime()));
}
