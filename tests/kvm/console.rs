//! The serial console on a terminal, a pipe, or without a reader.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::husk::{self, boot, is_emulated};
use crate::terminal::Terminal;
use husk_guests as guests;

/// Ends the echo guest.
const EOT: u8 = 4;

#[test]
fn a_flood_arrives_whole() {
    needs_kvm!();
    let flood = |bytes: usize| boot(guests::SERIAL, &format!("do=flood bytes={bytes}")).run().stdout;
    // Each byte causes an exit, which is slow on an emulated processor, so fewer are printed there.
    let bytes = if is_emulated() { 16 << 10 } else { 512 << 10 };
    let stdout = flood(bytes);
    assert_eq!(stdout.len(), bytes);
    let expected = |at: usize| if at % 64 == 63 { b'\n' } else { b'!' + (at % 64) as u8 };
    assert_eq!(stdout.iter().enumerate().find(|(at, byte)| **byte != expected(*at)), None);
}

#[test]
fn a_prompt_is_shown_before_its_line_ends() {
    needs_kvm!();
    let running = boot(guests::SERIAL, "do=prompt").start().wait_for("login: ");
    // Two pending signals of the same kind would be merged.
    running.signal("TERM");
    running.signal("INT");
    running.wait();
}

#[test]
fn piped_input_reaches_the_guest_whole() {
    needs_kvm!();
    for wait in ["poll", "interrupt"] {
        let typed: Vec<u8> = (0..8192u32).map(|n| (n * 7 % 251) as u8).filter(|byte| *byte != EOT).collect();
        let ran = boot(guests::SERIAL, &format!("do=echo wait={wait}")).input([&typed[..], &[EOT]].concat()).run();
        let end = format!("\nreceived {} bytes\n", typed.len());
        ran.expect(0);
        assert!(
            ran.stdout == [b"ready\n", &typed[..], end.as_bytes()].concat(),
            "by {wait}: {} bytes",
            ran.stdout.len()
        );
    }
}

/// The in-kernel PIC is not part of the machine: before the guest has set up its APIC, interrupts are not delivered.
#[test]
fn no_interrupt_arrives_before_the_guest_has_set_up_its_controller() {
    needs_kvm!();
    let mut command = boot(guests::SERIAL, "do=echo wait=bare").command();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    // The power button's line, then the serial port's.
    husk::send_signal(child.id(), "TERM");
    thread::sleep(Duration::from_millis(200));
    child.stdin.take().unwrap().write_all(&[b'x', EOT]).unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "x\nreceived 1 bytes\n");
    assert_eq!(husk::end_of(&mut child).and_then(|status| status.code()), Some(0));
}

#[test]
fn the_end_of_input_uses_no_cpu() {
    needs_kvm!();
    let running = boot(guests::POWER, "do=halt").start().wait_for("ready");
    thread::sleep(Duration::from_millis(300));
    let before = running.cpu_time();
    thread::sleep(Duration::from_secs(1));
    let spent = running.cpu_time() - before;
    // Two pending signals of the same kind would be merged.
    running.signal("TERM");
    running.signal("INT");
    running.wait();
    assert!(spent <= Duration::from_millis(200), "{spent:?} in a second of doing nothing");
}

#[test]
fn closing_the_output_ends_the_machine() {
    needs_kvm!();
    let mut command = boot(guests::SERIAL, "do=flood bytes=4000000").command();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    let status = husk::end_of(&mut child).expect("husk ends");
    assert_eq!(status.code(), Some(128 + libc::SIGPIPE));
}

#[test]
fn the_terminal_is_raw_while_the_machine_runs() {
    needs_kvm!();
    let mut terminal = Terminal::start(boot(guests::SERIAL, "do=echo wait=interrupt").command());
    terminal.wait_for("ready");
    assert!(!terminal.modes().canonical() && !terminal.modes().changes_output());
    // Ctrl-C is passed on to the guest.
    terminal.type_keys(b"typed\x03");
    terminal.wait_for("typed\x03");
    // husk's own messages are complete lines, and the guest's output is unchanged.
    terminal.type_keys(b"\x01h");
    terminal.wait_for("Ctrl-A p   press the power button\r\n");
    terminal.type_keys(&[EOT]);
    terminal.wait_for("\nreceived 6 bytes\n");
    assert!(terminal.shown().contains("ready\ntyped"), "{:?}", terminal.shown());
    assert_eq!(terminal.wait(), Some(0));
    assert!(terminal.modes().canonical() && terminal.modes().changes_output());
}

/// Boots `words` on a terminal, ends it with `end`, and checks the exit code and that the terminal is restored.
#[track_caller]
fn restores_the_terminal(words: &str, end: impl FnOnce(&mut Terminal), code: i32) {
    let untouched = Terminal::start(std::process::Command::new("true")).modes();
    let mut terminal = Terminal::start(boot(guests::POWER, words).command());
    end(&mut terminal);
    assert_eq!(terminal.wait(), Some(code));
    assert_eq!(terminal.modes(), untouched);
}

#[test]
fn ctrl_a_x_ends_the_machine_and_ctrl_a_h_helps() {
    needs_kvm!();
    restores_the_terminal(
        "do=halt",
        |terminal| {
            terminal.wait_for("ready");
            terminal.type_keys(b"\x01h");
            terminal.wait_for("Ctrl-A x");
            terminal.type_keys(b"\x01x");
        },
        0,
    );
}

#[test]
fn the_terminal_is_restored_after_a_guests_panic_and_a_triple_fault() {
    needs_kvm!();
    restores_the_terminal("do=panic", |_| (), 81);
    restores_the_terminal("do=triple-fault", |_| (), 82);
}

#[test]
fn the_terminal_is_restored_after_signals() {
    needs_kvm!();
    let ask = [("TERM", libc::SIGTERM), ("HUP", libc::SIGHUP), ("INT", libc::SIGINT)];
    let mean_nothing_here = [("ALRM", libc::SIGALRM), ("USR1", libc::SIGUSR1), ("36", 36)];
    for (name, number) in ask.into_iter().chain(mean_nothing_here) {
        restores_the_terminal(
            "do=spin",
            |terminal| {
                terminal.wait_for("ready");
                for _ in 0..2 {
                    husk::send_signal(terminal.pid(), name);
                    thread::sleep(Duration::from_millis(50));
                }
            },
            128 + number,
        );
    }
}

#[test]
fn the_terminal_is_restored_after_a_crash_of_husk() {
    needs_kvm!();
    let untouched = Terminal::start(std::process::Command::new("true")).modes();
    let mut terminal = Terminal::start(boot(guests::POWER, "do=halt").command());
    terminal.wait_for("ready");
    husk::send_signal(terminal.pid(), "SEGV");
    assert_eq!(terminal.wait(), None, "the signal ends it");
    assert_eq!(terminal.modes(), untouched);
}
