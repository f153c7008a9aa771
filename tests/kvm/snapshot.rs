//! Snapshots: machines are saved, and continue from the files.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::disk_image;

/// A machine that repeats its input, saved when it has repeated a word.
fn saved(machines: &Machines, flags: &[&str]) -> String {
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo"]);
    machines.await_log("echo", "ready");
    let path = machines.runtime.path().join("snapshot").to_str().unwrap().to_owned();
    assert_eq!(machines.ok(&[&["snapshot", "echo", &path], flags].concat()), format!("{path}\n"));
    path
}

/// Restores the snapshot at `path` with this input, and returns what the guest has printed.
#[track_caller]
pub fn restored(machines: &Machines, path: &str, input: &str) -> String {
    let mut command = machines.command(&["restore", path]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_machine_continues_from_its_snapshot_as_often_as_wanted() {
    needs_kvm!();
    let machines = Machines::new();
    let path = saved(&machines, &[]);
    for word in ["one", "two", "three"] {
        let printed = restored(&machines, &path, &format!("{word}\n\x04"));
        assert_eq!(printed.replace('\r', ""), format!("{word}\n\nreceived {} bytes\n", word.len() + 1));
    }
    assert_eq!(machines.status("echo"), "running", "the first one goes on");
    let ids = ["a", "b"].map(|name| machines.ok(&["restore", "-d", "--name", name, &path]));
    assert_ne!(ids[0], ids[1]);
    assert_eq!((machines.status("a"), machines.status("b")), ("running".into(), "running".into()));
    // A snapshot of what was restored.
    let again = format!("{path}.again");
    machines.ok(&["snapshot", "--stop", "a", &again]);
    machines.await_status("a", "exited");
    fs::remove_dir_all(&path).unwrap();
    assert!(restored(&machines, &again, "four\x04").starts_with("four"));
}

#[test]
fn a_machine_can_be_saved_while_it_is_paused_and_stays_so() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo"]);
    machines.await_log("echo", "ready");
    machines.ok(&["pause", "echo"]);
    let path = machines.runtime.path().join("snapshot").to_str().unwrap().to_owned();
    machines.ok(&["snapshot", "echo", &path]);
    assert_eq!(machines.status("echo"), "paused");
    assert!(restored(&machines, &path, "word\x04").starts_with("word"), "the restored one is not paused");
    machines.ok(&["unpause", "echo"]);
}

#[test]
fn a_stopped_machine_has_exited_successfully() {
    needs_kvm!();
    let machines = Machines::new();
    let path = saved(&machines, &["--stop"]);
    machines.await_status("echo", "exited");
    assert_eq!(machines.inspect("echo", "State/ExitCode"), "0");
    assert!(restored(&machines, &path, "word\x04").starts_with("word"));
}

#[test]
fn a_snapshot_is_refused_in_one_line() {
    needs_kvm!();
    let machines = Machines::new();
    let path = saved(&machines, &[]);
    let line = machines.fails(&["snapshot", "echo", &path], 1);
    assert!(line.contains("it exists: remove it, or choose another directory"), "{line}");
    let line = machines.fails(&["snapshot", "nobody", "x"], 1);
    assert!(line.starts_with("husk: no such machine"), "{line}");
    let line = machines.fails(&["restore", "/nowhere"], 1);
    assert!(line.starts_with("husk: open the snapshot /nowhere: No such file or directory"), "{line}");
    let state = Path::new(&path).join("state");
    let whole = fs::read(&state).unwrap();
    fs::write(&state, &whole[..whole.len() - 1]).unwrap();
    for flags in [&["restore"][..], &["restore", "-d"]] {
        let line = machines.fails(&[flags, &[&path]].concat(), 1);
        assert!(line.trim_end().ends_with("the file `state` is truncated"), "{line}");
    }
    assert_eq!(machines.ok(&["ps", "-aq"]).lines().count(), 1, "nothing is left behind");
    assert_eq!(machines.status("echo"), "running");
}

#[test]
fn a_disk_in_use_or_changed_is_refused() {
    needs_kvm!();
    let machines = Machines::new();
    let (_dir, disk) = disk_image(1 << 20);
    let flags = ["--name", "echo", "--disk", disk.to_str().unwrap()];
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &flags);
    machines.await_log("echo", "ready");
    let path = machines.runtime.path().join("snapshot").to_str().unwrap().to_owned();
    machines.ok(&["snapshot", "echo", &path]);
    let line = machines.fails(&["restore", &path], 1);
    assert!(line.contains("disk.img") && line.contains("in use"), "{line}");
    machines.ok(&["kill", "echo"]);
    machines.ok(&["wait", "echo"]);
    assert!(restored(&machines, &path, "word\x04").starts_with("word"));
    fs::write(&disk, vec![1; 1 << 20]).unwrap();
    let line = machines.fails(&["restore", &path], 1);
    assert!(line.contains("has changed since the snapshot"), "{line}");
    assert_eq!(machines.ok(&["ps", "-aq"]).lines().count(), 1, "nothing is left behind");
}

#[test]
fn a_full_disk_leaves_no_snapshot_and_the_machine_goes_on() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo"]);
    machines.await_log("echo", "ready");
    let small = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k", "none"]).arg(small.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: only root mounts a small disk to fill");
        return;
    }
    let path = small.path().join("snapshot");
    let line = machines.fails(&["snapshot", "echo", path.to_str().unwrap()], 1);
    assert!(line.contains("No space left on device"), "{line}");
    assert!(!path.exists());
    assert_eq!(machines.status("echo"), "running");
    machines.ok(&["snapshot", "echo", &format!("{}.snapshot", small.path().display())]);
    fs::remove_dir_all(format!("{}.snapshot", small.path().display())).unwrap();
    assert!(Command::new("umount").arg(small.path()).status().unwrap().success());
}

#[test]
fn a_suspended_machine_continues_when_it_is_started() {
    needs_kvm!();
    let machines = Machines::new();
    let data = tempfile::tempdir().unwrap();
    let husk = |words: &[&str]| {
        let output = machines.command(words).env("HUSK_DATA", data.path()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let id = machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo"]);
    machines.await_log("echo", "ready");
    for round in 0..2 {
        assert_eq!(husk(&["suspend", "echo"]), (Some(0), "echo\n".into()));
        let list = machines.ok(&["ps", "-a"]);
        assert!(list.contains("Suspended") && list.contains(&id), "{list}");
        let snapshot = data.path().join("suspended").join(&id);
        assert!(snapshot.join("state").exists());
        if round == 0 {
            // What cannot be continued stays suspended.
            fs::rename(snapshot.join("memory"), snapshot.join("elsewhere")).unwrap();
            let (code, errors) = husk(&["start", "echo"]);
            assert!(code == Some(1) && errors.contains("open the file `memory`"), "{errors}");
            assert_eq!(machines.status("echo"), "suspended");
            fs::rename(snapshot.join("elsewhere"), snapshot.join("memory")).unwrap();
        }
        assert_eq!(husk(&["start", "echo"]), (Some(0), "echo\n".into()));
        assert_eq!((machines.status("echo"), machines.inspect("echo", "Id")), ("running".into(), id.clone()));
        assert!(!snapshot.exists(), "the machine has taken it");
    }
    // husk was killed just before it said so.
    assert_eq!(husk(&["suspend", "echo"]).0, Some(0));
    let record = machines.runtime.path().join("husk").join(&id).join("record.json");
    let text = fs::read_to_string(&record).unwrap();
    let running = text.replace("\"status\": \"suspended\"", "\"status\": \"running\"");
    assert_ne!(running, text);
    fs::write(&record, running).unwrap();
    assert_eq!(machines.status("echo"), "suspended", "its snapshot is complete");
    assert_eq!(husk(&["start", "echo"]), (Some(0), "echo\n".into()));
    let mut attached = machines.attach("echo");
    attached.stdin.take().unwrap().write_all(b"word\x04").unwrap();
    let output = attached.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("word"), "{output:?}");
    assert_eq!(machines.ok(&["wait", "echo"]), "0\n");
    assert!(machines.ok(&["logs", "echo"]).starts_with("ready"), "its log goes on");
    machines.ok(&["rm", "echo"]);
    let flags = ["--name", "echo", "--restart", "on-failure:3", "--log-max", "64K"];
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &flags);
    machines.await_log("echo", "ready");
    assert_eq!((husk(&["suspend", "echo"]).0, husk(&["start", "echo"]).0), (Some(0), Some(0)));
    let kept =
        ["HostConfig/RestartPolicy/MaximumRetryCount", "Husk/LogMaxBytes"].map(|what| machines.inspect("echo", what));
    assert_eq!(kept, ["3", "65536"]);
    assert_eq!(husk(&["suspend", "echo"]).0, Some(0));
    assert_eq!(husk(&["restart", "echo"]).0, Some(0));
    machines.await_status("echo", "running");
    let is_booted_again = || machines.ok(&["logs", "echo"]).matches("ready").count() == 2;
    while !is_booted_again() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(husk(&["suspend", "echo"]).0, Some(0));
    assert_eq!(husk(&["rm", "echo"]).0, Some(0));
    assert_eq!(fs::read_dir(data.path().join("suspended")).unwrap().count(), 0, "rm removes the snapshot");
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--rm", "--name", "echo"]);
    let (code, errors) = husk(&["suspend", "echo"]);
    assert!(code == Some(1) && errors.contains("can be suspended"), "{errors}");
}
