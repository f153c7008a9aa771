//! The confinement of a real monitor process, and what happens if it or its supervisor dies.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{Running, await_exit, boot, disk_image, is_emulated, monitor_of, send_signal};

/// A user and a group that own nothing.
const NOBODY: u32 = 65534;
const KVM: &str = "/dev/kvm";

/// The status of each thread of a process (proc_pid_status(5)).
fn statuses(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap()).collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
}

/// A machine with a disk, whose guest waits.
fn waiting(sandbox: &'static str) -> (tempfile::TempDir, Running) {
    let (dir, disk) = disk_image(1 << 20);
    let machine = boot(guests::BLOCK, "do=hold").disk(&disk, "").flag("--sandbox", sandbox);
    (dir, machine.start().wait_for("ready"))
}

/// Whether this host allows all layers; prints a visible message if not.
fn has_all_layers() -> bool {
    let lacks = husk::sandbox::probe().unwrap();
    if !lacks.is_empty() {
        eprintln!("SKIPPED: this host does not allow all layers of the sandbox: {}", lacks.join("; "));
    }
    lacks.is_empty()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn namespace(pid: u32, kind: &str) -> u64 {
    fs::metadata(format!("/proc/{pid}/ns/{kind}")).unwrap().ino()
}

#[test]
fn every_thread_of_a_monitor_is_confined() {
    needs_kvm!();
    if !has_all_layers() {
        return;
    }
    let (_dir, machine) = waiting("on");
    let (supervisor, monitor) = (machine.pid(), machine.monitor());
    let confined = |status: &String| {
        let name = field(status, "Name");
        // The kernel's own threads have neither a filter nor a choice.
        if name.starts_with("kvm") || name.starts_with("vhost") || name.starts_with("iou-") {
            return true;
        }
        field(status, "Seccomp") == "2" && field(status, "NoNewPrivs") == "1"
    };
    // The main thread's filter is installed while the guest is already running.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !statuses(monitor).iter().all(confined) {
        assert!(Instant::now() < deadline, "{:#?}", statuses(monitor));
        thread::sleep(Duration::from_millis(5));
    }
    for status in statuses(monitor) {
        assert_eq!(field(&status, "CapEff"), "0000000000000000", "{status}");
        assert_eq!(field(&status, "CapPrm"), "0000000000000000", "{status}");
        if is_root() {
            let uid: u32 = field(&status, "Uid").split_whitespace().next().unwrap().parse().unwrap();
            assert!(uid >= 2_000_000_000, "{status}");
            assert_eq!(field(&status, "Groups"), "");
        }
    }
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        assert_ne!(namespace(monitor, kind), namespace(supervisor, kind), "{kind}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{monitor}/root")).unwrap().count(), 0, "its root directory is empty");
    let limits = fs::read_to_string(format!("/proc/{monitor}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    machine.signal("KILL");
    machine.wait();
}

#[test]
fn a_monitor_has_only_the_files_of_its_machine() {
    needs_kvm!();
    let (dir, machine) = waiting("on");
    let files = fs::read_dir(format!("/proc/{}/fd", machine.monitor())).unwrap().flatten();
    let files: Vec<String> =
        files.filter_map(|file| Some(fs::read_link(file.path()).ok()?.display().to_string())).collect();
    let allowed =
        ["anon_inode:", "socket:[", "pipe:[", "/dev/null", "/dev/kvm", guests::BLOCK, dir.path().to_str().unwrap()];
    for file in &files {
        assert!(allowed.iter().any(|allowed| file.starts_with(allowed)), "{file} of {files:#?}");
    }
    assert!(files.iter().any(|file| file.ends_with("disk.img")), "{files:?}");
    machine.signal("KILL");
    machine.wait();
}

#[test]
fn without_the_sandbox_nothing_is_confined() {
    needs_kvm!();
    let (_dir, machine) = waiting("off");
    let (supervisor, monitor) = (machine.pid(), machine.monitor());
    assert!(
        statuses(monitor).iter().all(|status| field(status, "Seccomp") == field(&statuses(supervisor)[0], "Seccomp"))
    );
    assert_eq!(namespace(monitor, "mnt"), namespace(supervisor, "mnt"));
    machine.signal("KILL");
    machine.wait();
}

#[test]
fn a_violation_ends_the_machine_with_a_line_that_names_it() {
    needs_kvm!();
    let (dir, machine) = waiting("on");
    // As the kernel signals it, except that no call is named.
    send_signal(machine.monitor(), "SYS");
    let ran = machine.wait();
    let line = ran.expect_line(159);
    assert!(line.starts_with("husk: the sandbox stopped system call ") && line.contains(" thread "), "{line}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the disk itself");
}

#[test]
fn a_monitor_that_is_killed_ends_its_machine() {
    needs_kvm!();
    let (dir, machine) = waiting("on");
    send_signal(machine.monitor(), "KILL");
    let ran = machine.wait();
    assert_eq!(ran.expect_line(137), "husk: the monitor process was killed by signal 9");
    boot(guests::BLOCK, "do=round-trip").disk(&dir.path().join("disk.img"), "").run().expect(0);

    let machines = Machines::new();
    machines.start(guests::POWER, "do=halt", &["--name", "back"]);
    let supervisor = machines.inspect("back", "State/Pid").parse().unwrap();
    send_signal(monitor_of(supervisor), "KILL");
    machines.await_status("back", "exited");
    assert_eq!(machines.ok(&["wait", "back"]), "137\n");
}

#[test]
fn a_monitor_does_not_outlive_its_supervisor() {
    needs_kvm!();
    let (dir, machine) = waiting("on");
    let monitor = machine.monitor();
    machine.signal("KILL");
    machine.wait();
    await_exit(monitor);
    boot(guests::BLOCK, "do=round-trip").disk(&dir.path().join("disk.img"), "").run().expect(0);
}

#[test]
fn a_machine_with_an_attached_client_is_restarted() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "again", "--restart", "on-failure:1"]);
    let mut client = machines.attach("again");
    let supervisor: u32 = machines.inspect("again", "State/Pid").parse().unwrap();
    send_signal(monitor_of(supervisor), "KILL");
    let deadline = Instant::now() + Duration::from_secs(60);
    while machines.inspect("again", "RestartCount") != "1" || machines.status("again") != "running" {
        assert!(Instant::now() < deadline, "{}", machines.ok(&["ps", "-a"]));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(client.try_wait().unwrap().is_none(), "the client stays attached");
    let _ = client.kill();
    let _ = client.wait();
    machines.ok(&["kill", "again"]);
}

/// Lets every user access /dev/kvm until this is dropped.
struct OpenToAll(fs::Permissions);

impl OpenToAll {
    fn new() -> OpenToAll {
        let before = fs::metadata(KVM).unwrap().permissions();
        fs::set_permissions(KVM, fs::Permissions::from_mode(before.mode() | 0o666)).unwrap();
        OpenToAll(before)
    }
}

impl Drop for OpenToAll {
    fn drop(&mut self) {
        let _ = fs::set_permissions(KVM, self.0.clone());
    }
}

#[test]
fn a_plain_user_has_the_same_sandbox() {
    needs_kvm!();
    if !is_root() || !has_all_layers() {
        return;
    }
    let _open = OpenToAll::new();
    let dir = tempfile::tempdir().unwrap();
    let [husk, kernel, run] = ["husk", "kernel", "run"].map(|name| dir.path().join(name));
    fs::copy(env!("CARGO_BIN_EXE_husk"), &husk).unwrap();
    fs::copy(guests::POWER, &kernel).unwrap();
    fs::create_dir(&run).unwrap();
    for path in [dir.path(), &husk, &kernel] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&run, Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = Command::new(&husk);
    command.args(["--verbose", "boot", "--cmdline", "do=exit code=9", "--kernel"]).arg(&kernel);
    command.env("XDG_RUNTIME_DIR", &run).env("HOME", &run).uid(NOBODY).gid(NOBODY);
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(9), "{printed}");
    assert!(!printed.contains("the sandbox lacks"), "{printed}");
}

#[test]
fn a_monitor_that_does_not_respond_is_killed_with_its_machine() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=spin", &["--name", "stuck"]);
    let monitor = monitor_of(machines.inspect("stuck", "State/Pid").parse().unwrap());
    send_signal(monitor, "STOP");
    machines.ok(&["kill", "stuck"]);
    assert_eq!(machines.ok(&["wait", "stuck"]), "137\n");
    assert!(fs::metadata(format!("/proc/{monitor}/exe")).is_err(), "it was killed");
    machines.ok(&["rm", "stuck"]);
}

#[test]
fn input_goes_on_while_other_commands_ask() {
    needs_kvm!();
    let input_bytes = if is_emulated() { 6_000 } else { 60_000 };
    let machines = Machines::new();
    let words = ["boot", "--name", "echo", "--kernel", guests::SERIAL, "--cmdline", "do=echo wait=interrupt"];
    let mut command = machines.command(&words);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let reader = thread::spawn(move || {
        let mut echoed = vec![0; input_bytes];
        output.read_exact(&mut echoed).map(|()| echoed)
    });
    let writer = thread::spawn(move || input.write_all(&vec![b'y'; input_bytes]).map(|()| input));
    let deadline = Instant::now() + Duration::from_secs(100);
    while !reader.is_finished() {
        assert!(Instant::now() < deadline, "the guest gets no more input");
        let _ = machines.run(&["stats", "--json", "echo"]);
    }
    let echoed = reader.join().unwrap().unwrap();
    assert!(echoed.iter().filter(|byte| **byte == b'y').count() > input_bytes - 100);
    let _ = (child.kill(), child.wait(), writer.join());
}

#[test]
fn limits_of_disks_reach_the_monitor() {
    needs_kvm!();
    let machines = Machines::new();
    let (_dir, disk) = disk_image(1 << 20);
    machines.start(guests::BLOCK, "do=hold", &["--name", "held", "--disk", disk.to_str().unwrap()]);
    machines.ok(&["update", "--disk-bps", "10M", "held"]);
    machines.ok(&["update", "--disk-bps", "none", "--disk-iops", "100", "held"]);
    assert_eq!(machines.inspect("held", "Husk/Config/disks/0/rate/ops_per_second"), "100");
    machines.ok(&["pause", "held"]);
    machines.ok(&["unpause", "held"]);
    machines.ok(&["stats", "--json", "held"]);
    machines.ok(&["kill", "held"]);
}
