//! Contenders with a kernel of their own.

use std::ffi::OsStr;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk::bench::contender::{Contender, Job, Launch};
use husk::bench::fixture::Fixture;

use crate::{LONG, cannot_run_machines, clean_up, job, leftovers, log, output, prepare_lab, present, start};

#[test]
fn machines_run_the_workload_and_leave_nothing_behind() {
    if cannot_run_machines() {
        return;
    }
    let lab = prepare_lab();
    let fixture = &lab.fixture;
    for mut contender in present(fixture, true) {
        let name = contender.name().to_owned();
        contender.prepare(fixture).unwrap();
        let script = "echo work: ready; cd /.husk-bench; /bin/busybox ls -1; /bin/busybox id -u; exit 7";
        let (printed, code) = machine(&*contender, fixture, &job(1, script));
        assert_eq!(code, Some(7), "{name}: {printed}");
        for line in ["work: ready", "data", "work", "0"] {
            assert!(printed.lines().any(|printed| printed.trim() == line), "{name} did not log {line}: {printed}");
        }
        let script = "/bin/busybox df /scratch; echo x > /scratch/x && echo done; /bin/busybox free -m";
        let with_scratch = Job { scratch_mib: Some(64), ..job(2, script) };
        let (printed, code) = machine(&*contender, fixture, &with_scratch);
        assert!(
            printed.lines().any(|printed| printed.trim() == "done") && code == Some(0),
            "{name}: {code:?} {printed}"
        );
        if name == "husk-warm" {
            assert_does_not_boot(contender.launch(fixture, &job(2, "exit 7")).unwrap());
        }
        if contender.exits_on_kernel_crash() {
            let command = ["/.husk-bench/work", "crash", "kernel", "--this-is-a-machine"].map(str::to_owned).to_vec();
            let (printed, _) = machine(&*contender, fixture, &Job { command, ..job(3, "") });
            assert!(
                printed.lines().any(|printed| printed.trim() == "work: ready"),
                "{name} crashed without a word: {printed}"
            );
            assert!(!printed.contains("work: fail"), "{name}: {printed}");
        }
        let mut launch = contender.launch(fixture, &job(4, &format!("/bin/busybox sleep {LONG}"))).unwrap();
        let mut child = start(&mut launch);
        thread::sleep(Duration::from_secs(2));
        child.kill().unwrap();
        child.wait().unwrap();
        clean_up(&mut launch);
        assert_eq!(leftovers(fixture), Vec::<String>::new(), "{name}");
        contender.clean_up(fixture).unwrap();
    }
    let disks = fs::read_dir(fixture.store.join("disks")).unwrap().count();
    assert_eq!(disks, 0);
}

/// Its timings have no start of PID 1, which is in the past of the machine that it continues.
fn assert_does_not_boot(launch: Launch) {
    let mut words: Vec<_> = launch.command.get_args().map(OsStr::to_owned).collect();
    words.insert(1, "--timings".into());
    let mut command = Command::new(launch.command.get_program());
    for (name, value) in launch.command.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let output = command.args(words).stdin(Stdio::null()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(7), "{printed}");
    let pid1 = printed.lines().find(|line| line.starts_with("PID 1")).unwrap();
    assert!(pid1.ends_with('-'), "{printed}");
}

/// Returns the output of a machine and the exit code of its command.
fn machine(contender: &dyn Contender, fixture: &Fixture, job: &Job) -> (String, Option<i32>) {
    let mut launch = contender.launch(fixture, job).unwrap();
    let started = Instant::now();
    let (printed, code) = output(&mut launch);
    log(&format!("{}: {:.1} s", contender.name(), started.elapsed().as_secs_f64()));
    clean_up(&mut launch);
    assert_eq!(leftovers(fixture), Vec::<String>::new(), "{}", contender.name());
    let reported = printed.lines().find_map(|line| line.trim().strip_prefix("work: exit ")?.parse().ok());
    (printed, if launch.passes_exit_code { code } else { reported })
}
