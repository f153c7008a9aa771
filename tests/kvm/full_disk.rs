//! Machines with a full disk: log output is lost, but machines keep working.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::Command;

use crate::background::Machines;
use crate::husk::own_lines;
use husk_guests as guests;

/// Machines on a file system of 256 KiB. `None` with a visible message if it cannot be mounted.
fn machines_on_a_small_disk() -> Option<Machines> {
    let mut machines = Machines::new();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=256k,mode=700", "none"]).arg(machines.runtime.path());
    machines.mounted = mount.status().is_ok_and(|status| status.success());
    if !machines.mounted {
        let _ = writeln!(std::io::stderr(), "SKIPPED: only root mounts a small disk to fill");
    }
    machines.mounted.then_some(machines)
}

/// Fills the disk until the file is removed.
fn fill(machines: &Machines) -> PathBuf {
    let path = machines.runtime.path().join("ballast");
    let mut file = File::create(&path).unwrap();
    let full = loop {
        if let Err(error) = file.write_all(&[0; 512]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    path
}

#[test]
fn a_start_on_a_full_disk_fails_and_leaves_nothing_behind() {
    needs_kvm!();
    let Some(machines) = machines_on_a_small_disk() else { return };
    let ballast = fill(&machines);
    for flags in [&["boot", "-d"][..], &["boot"]] {
        let words = [flags, &["--name", "a", "--kernel", guests::EXIT, "--memory", "64M"]].concat();
        let line = machines.fails(&words, 1);
        assert!(line.contains("No space left on device"), "{line}");
        let left: Vec<_> = fs::read_dir(machines.runtime.path().join("husk/names")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(machines.ok(&["ps", "-aq"]), "");
    }
    fs::remove_file(ballast).unwrap();
    machines.start(guests::EXIT, "", &["--name", "a"]);
    assert_eq!(machines.ok(&["wait", "a"]), "42\n");
}

#[test]
fn a_machine_on_a_full_disk_loses_only_output() {
    needs_kvm!();
    let Some(machines) = machines_on_a_small_disk() else { return };
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "tty"]);
    machines.await_log("tty", "ready");
    let ballast = fill(&machines);
    // All commands that update the record.
    machines.ok(&["pause", "tty"]);
    assert_eq!(machines.status("tty"), "paused");
    machines.ok(&["unpause", "tty"]);
    machines.ok(&["rename", "tty", "a-name-that-is-a-good-deal-longer"]);
    machines.ok(&["rename", "a-name-that-is-a-good-deal-longer", "console"]);
    assert_eq!((machines.status("console"), machines.names()), ("running".into(), 1));
    // More than fits, and its end.
    machines.attach("console").stdin.take().unwrap().write_all(&[b'x'; 20_000]).unwrap();
    let mut last = machines.attach("console");
    last.stdin.as_mut().unwrap().write_all(b"\x04").unwrap();
    let code = last.wait_with_output().unwrap().status.code().unwrap();
    assert_eq!((machines.status("console"), machines.ok(&["wait", "console"])), ("exited".into(), format!("{code}\n")));
    assert_eq!(machines.inspect("console", "State/ExitCode"), code.to_string());
    assert!(machines.ok(&["logs", "console"]).starts_with("ready\n"));
    fs::remove_file(ballast).unwrap();
    machines.ok(&["rm", "console"]);
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
}

#[test]
fn a_log_that_filled_the_disk_does_not_hide_how_the_machine_ended() {
    needs_kvm!();
    let Some(machines) = machines_on_a_small_disk() else { return };
    let bytes = if crate::husk::is_emulated() { 20_000 } else { 600_000 };
    let ballast = fill(&machines);
    File::options()
        .write(true)
        .open(&ballast)
        .unwrap()
        .set_len(fs::metadata(&ballast).unwrap().len() - 16_384)
        .unwrap();
    machines.start(guests::SERIAL, &format!("do=flood bytes={bytes}"), &["--name", "loud"]);
    assert_eq!(machines.ok(&["wait", "loud"]), "0\n");
    assert_eq!((machines.status("loud"), machines.inspect("loud", "State/ExitCode")), ("exited".into(), "0".into()));
    assert!(machines.ok(&["logs", "loud"]).len() < 16_384);
}

#[test]
fn output_for_which_there_is_no_room_ends_a_machine() {
    needs_kvm!();
    let machines = Machines::new();
    let mut command =
        machines.command(&["boot", "--kernel", guests::SERIAL, "--cmdline", "do=flood", "--memory", "64M"]);
    let output = command.stdout(File::options().write(true).open("/dev/full").unwrap()).output().unwrap();
    let line = "husk: the machine's output cannot be written: No space left on device\n";
    assert_eq!((output.status.code(), &*own_lines(&output.stderr)), (Some(1), line));
}
