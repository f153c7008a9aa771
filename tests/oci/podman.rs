//! podman with husk as its runtime.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::{Ended, Runtime, await_that, finish, runtime};

/// podman with directories of its own, so that it touches nothing of the host's.
pub struct Podman {
    pub runtime: Runtime,
    user: Option<u32>,
}

impl Podman {
    /// podman of root, or of the user with this ID and the same group, with an image `box`. Nothing if there is no podman.
    pub fn new(runtime: Runtime, user: Option<u32>) -> Option<Podman> {
        if finish(Command::new("sh").args(["-c", "command -v podman && command -v conmon"])).code != Some(0) {
            eprintln!("SKIPPED: no podman; `scripts/test guests` runs this in the lab");
            return None;
        }
        let archive = runtime.path("root.tar");
        finish(Command::new("tar").arg("cf").arg(&archive).arg("-C").arg(runtime.path("rootfs")).arg(".")).expect(0);
        // A build has no annotations that name a kernel.
        let kernels = runtime.path("home/.cache/husk/kernels");
        fs::create_dir_all(&kernels).unwrap();
        symlink(runtime.kernel.parent().unwrap(), kernels.join("micro")).unwrap();
        fs::create_dir(runtime.path("session")).unwrap();
        for name in ["", "session", "home", "home/.cache"] {
            chown(runtime.path(name), user, user).unwrap();
        }
        let podman = Podman { runtime, user };
        podman.run(&["import", archive.to_str().unwrap(), "box"]).expect(0);
        Some(podman)
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("HOME", self.runtime.path("home")).env("TMPDIR", self.runtime.dir.path()).current_dir("/");
        if let Some(user) = self.user {
            command.uid(user).gid(user).env("XDG_RUNTIME_DIR", self.runtime.path("session"));
        }
        command
    }

    /// The command line of podman without a command.
    pub fn line(&self) -> String {
        let dir = |flag: &str, name: &str| format!("{flag} {}", self.runtime.path(name).display());
        let flags = "podman --storage-driver vfs --cgroup-manager cgroupfs --events-backend file";
        let dirs = [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "tmp"), ("--runtime", "husk-oci")]
            .map(|(flag, name)| dir(flag, name));
        format!("{flags} {}", dirs.join(" "))
    }

    pub fn run(&self, words: &[&str]) -> Ended {
        let line = self.line();
        let mut flags = line.split(' ');
        finish(self.command(flags.next().unwrap()).args(flags).args(words))
    }

    /// `podman run` with these flags and this script.
    pub fn shell(&self, flags: &[&str], script: &str) -> Ended {
        let annotation = format!("io.husk.kernel={}", self.runtime.kernel.display());
        let network = if flags.contains(&"--network") { &[][..] } else { &["--network", "none"] };
        let before = ["run", "--annotation", &annotation];
        self.run(&[&before[..], network, flags, &["box", "sh", "-c", script]].concat())
    }
}

#[test]
fn podman_runs_containers_in_machines() {
    let Some(podman) = Podman::new(runtime!(), None) else { return };
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

    let data = podman.runtime.path("data");
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
    fs::write(podman.runtime.path("copied"), "to the container").unwrap();
    podman.run(&["cp", podman.runtime.path("copied").to_str().unwrap(), "web:/root/"]).expect(0);
    assert_eq!(podman.run(&["exec", "web", "cat", "/root/copied"]).expect(0), "to the container");
    let back = podman.runtime.path("passwd");
    podman.run(&["cp", "web:/etc/passwd", back.to_str().unwrap()]).expect(0);
    assert_eq!(fs::read(back).unwrap(), fs::read(podman.runtime.path("rootfs/etc/passwd")).unwrap());
    podman.run(&["pause", "web"]).expect(0);
    podman.run(&["unpause", "web"]).expect(0);
    podman.run(&["stop", "-t", "60", "web"]).expect(0);
    assert_eq!(podman.run(&["inspect", "--format", "{{.State.ExitCode}}", "web"]).expect(0), "4\n");
    assert_eq!(podman.run(&["logs", "web"]).expect(0), "got\n");
    podman.run(&["start", "web"]).expect(0);
    podman.run(&["rm", "-f", "-t", "0", "web"]).expect(0);
    assert_eq!(podman.run(&["ps", "-aq"]).expect(0), "");
}
