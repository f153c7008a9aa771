//! The ways in which a machine ends, initiated by its guest and by its user.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::{boot, finish, guests, husk, is_lab, signal, start_and_wait, uplink};

#[test]
fn a_reboot_ends_with_its_own_code() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", "reboot", &[]);
        ended.expect(80, kernel);
        assert!(ended.errors.contains("husk: the guest reset itself"), "{}", ended.errors);
        assert!(!ended.output.contains("PCI:"), "a kernel that knows of PCI finds its bus: {}", ended.output);
    }
}

#[test]
fn a_panic_is_reported_with_its_message_and_stops_passt() {
    let guests = guests!();
    let port = TcpListener::bind(("0.0.0.0", 0)).unwrap().local_addr().unwrap().port();
    let published = format!("{port}:80");
    let flags = if uplink::host().is_some() { &["-p", &published][..] } else { &[] };
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", "panic", flags);
        ended.expect(81, kernel);
        let told = "husk: the guest kernel panicked: Attempted to kill init!";
        assert!(ended.errors.contains(told), "{kernel}: {}", ended.errors);
        assert!(TcpListener::bind(("0.0.0.0", port)).is_ok(), "passt has the port still");
    }
}

#[test]
fn a_guest_reports_its_own_exit_code() {
    boot(&guests!().join("micro"), "vmlinux", "exit", &[]).expect(42, "exit port");
}

#[test]
fn sigterm_presses_the_power_button() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let (child, _) = start_and_wait(&mut husk(&guests.join(kernel), "vmlinux", "button", &[]), "waiting=event");
        // The guest opens the device just after this message.
        thread::sleep(Duration::from_millis(500));
        signal(&child, "TERM");
        finish(child).expect(0, kernel);
    }
}

#[test]
fn piped_commands_reach_a_shell() {
    let mut command = husk(&guests!().join("micro"), "vmlinux", "shell", &[]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo sum=$((40 + 2)); uname -s\npoweroff -f\n").unwrap();
    let ended = finish(child);
    ended.expect(0, "shell");
    assert!(ended.output.contains("sum=42") && ended.output.contains("Linux"), "{}", ended.output);
}

#[test]
fn the_demo_shell_exits_by_poweroff_and_by_the_power_button() {
    let guest = guests!().join("micro");
    let start = || {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.arg("boot").arg("--kernel").arg(guest.join("vmlinux")).arg("--initrd").arg(guest.join("demo"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Kept open until the machine has ended, since the end of input would end it too.
        let input = child.stdin.take().unwrap();
        (child, input)
    };
    let (child, mut input) = start();
    input.write_all(b"poweroff\n").unwrap();
    finish(child).expect(0, "poweroff");

    let (mut child, mut input) = start();
    input.write_all(b"echo up=$((1 + 1))\n").unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("up=2") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the guest ended");
    }
    signal(&child, "TERM");
    finish(child).expect(0, "power button");
}

#[test]
fn many_boots_in_a_row_all_end() {
    let guest = guests!().join("micro");
    let boots = if is_lab() { 8 } else { 20 };
    for n in 1..=boots {
        boot(&guest, "vmlinux", "none", &["--cpus", "2"]).expect(0, &format!("boot {n} of {boots}"));
    }
}
