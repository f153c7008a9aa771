//! podman with husk as its runtime.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Ended, Runtime, await_that, finish, runtime};

/// podman with directories of its own, so that it touches nothing of the host's.
struct Podman(Runtime);

impl Podman {
    fn run(&self, words: &[&str]) -> Ended {
        let mut command = Command::new("podman");
        for (flag, dir) in [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(flag).arg(self.0.path(dir));
        }
        command.args([
            "--storage-driver",
            "vfs",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
            "--runtime",
        ]);
        command
            .arg(self.0.path("husk-oci"))
            .args(words)
            .env("HOME", self.0.path("home"))
            .env("TMPDIR", self.0.dir.path());
        finish(&mut command)
    }

    /// `podman run` with these flags and this script.
    fn shell(&self, flags: &[&str], script: &str) -> Ended {
        let annotation = format!("io.husk.kernel={}", self.0.kernel.display());
        let before = ["run", "--network", "none", "--annotation", &annotation];
        self.run(&[&before[..], flags, &["box", "sh", "-c", script]].concat())
    }
}

#[test]
fn podman_runs_containers_in_machines() {
    let runtime = runtime!();
    if finish(Command::new("sh").args(["-c", "command -v podman && command -v conmon"])).code != Some(0) {
        eprintln!("SKIPPED: no podman; `scripts/test guests` runs this in the lab");
        return;
    }
    let podman = Podman(runtime);
    let archive = podman.0.path("root.tar");
    finish(Command::new("tar").arg("cf").arg(&archive).arg("-C").arg(podman.0.path("rootfs")).arg(".")).expect(0);
    podman.run(&["import", archive.to_str().unwrap(), "box"]).expect(0);

    let script = "id -u; cat /proc/sys/kernel/osrelease; echo $A; touch /x; touch /t/x; hostname; \
                  grep -e NoNew -e Seccomp: /proc/self/status; cat /sys/fs/cgroup/pids.max; exit 5";
    let flags = [
        "--rm",
        "--read-only",
        "--tmpfs",
        "/t:mode=1777",
        "-e",
        "A=b",
        "-u",
        "1000",
        "--hostname",
        "hh",
        "--pids-limit",
        "30",
        "--security-opt",
        "no-new-privileges",
    ];
    let ended = podman.shell(&flags, script);
    let printed = ended.expect(5);
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for line in ["1000", "b", "hh", "NoNewPrivs:\t1", "Seccomp:\t2", "30"] {
        assert!(printed.lines().any(|printed| printed == line), "{line} in {printed}");
    }
    assert!(
        !printed.contains(own.trim()) && ended.errors.contains("/x: Read-only file system"),
        "{printed}{}",
        ended.errors
    );
    assert_eq!(podman.run(&["run", "--rm", "--network", "none", "box", "no-such-program"]).code, Some(127));

    let data = podman.0.path("data");
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let script = "trap 'echo got; exit 4' TERM; echo up > /data/up; while :; do sleep 0.1; done";
    podman.shell(&["-d", "--name", "web", "-m", "160m", "--cpus", "2", "-v", &volume], script).expect(0);
    await_that(|| data.join("up").exists(), || "the container does not run".into());
    assert_eq!(podman.run(&["exec", "web", "sh", "-c", "nproc; cat /data/up; exit 6"]).expect(6), "2\nup\n");
    let terminal = podman.run(&["exec", "-t", "web", "sh", "-c", "tty"]);
    assert!(terminal.expect(0).starts_with("/dev/pts/"), "{}", terminal.output);
    let pid = podman.run(&["inspect", "--format", "{{.State.Pid}}", "web"]).expect(0).trim().to_owned();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    // podman enters the namespaces of the container's process for these.
    fs::write(podman.0.path("copied"), "to the container").unwrap();
    podman.run(&["cp", podman.0.path("copied").to_str().unwrap(), "web:/root/"]).expect(0);
    assert_eq!(podman.run(&["exec", "web", "cat", "/root/copied"]).expect(0), "to the container");
    let back = podman.0.path("passwd");
    podman.run(&["cp", "web:/etc/passwd", back.to_str().unwrap()]).expect(0);
    assert_eq!(fs::read(back).unwrap(), fs::read(podman.0.path("rootfs/etc/passwd")).unwrap());
    podman.run(&["pause", "web"]).expect(0);
    podman.run(&["unpause", "web"]).expect(0);
    podman.run(&["stop", "-t", "60", "web"]).expect(0);
    assert_eq!(podman.run(&["inspect", "--format", "{{.State.ExitCode}}", "web"]).expect(0), "4\n");
    assert_eq!(podman.run(&["logs", "web"]).expect(0), "got\n");
    podman.run(&["start", "web"]).expect(0);
    podman.run(&["rm", "-f", "-t", "0", "web"]).expect(0);
    assert_eq!(podman.run(&["ps", "-aq"]).expect(0), "");
}
