//! Standard streams and terminals: every byte, in order, to its own end.

use std::time::Duration;

use crate::image::archive;
use crate::terminal::Terminal;
use crate::{finish, guests, husk_run, shell};

/// Bytes that compress badly and repeat late.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(next());
    }
    bytes.truncate(len);
    bytes
}

fn there_and_back(len: usize) {
    let guests = guests!();
    let bytes = noise(len);
    let ended = finish(husk_run(&guests, &["-i", archive(), "cat"]), bytes.clone());
    ended.expect(0);
    assert_eq!(ended.output.len(), bytes.len());
    assert!(ended.output == bytes, "the bytes are not the same");
}

#[test]
fn sixty_four_mebibytes_pass_both_ways_unchanged() {
    there_and_back(64 << 20);
}

#[test]
#[ignore = "minutes long in the lab: --ignored runs it"]
fn a_gibibyte_passes_both_ways_unchanged() {
    there_and_back(1 << 30);
}

#[test]
fn outputs_stay_apart() {
    let ended = shell(&guests!(), &[], "echo one; echo two >&2; echo three");
    assert_eq!(ended.expect(0).text(), "one\nthree\n");
    assert!(ended.errors.ends_with("two\n") && !ended.errors.contains("one"), "{}", ended.errors);
}

#[test]
fn input_is_the_commands_only_if_it_is_asked_for() {
    let guests = guests!();
    let without = finish(husk_run(&guests, &[archive(), "wc", "-c"]), b"12345".to_vec());
    assert_eq!(without.expect(0).text(), "0\n");
    let with = finish(husk_run(&guests, &["-i", archive(), "wc", "-c"]), b"12345".to_vec());
    assert_eq!(with.expect(0).text(), "5\n");
}

#[test]
fn a_command_that_reads_no_further_ends_though_there_is_more() {
    let ended = finish(husk_run(&guests!(), &["-i", archive(), "head", "-c", "3"]), vec![b'x'; 8 << 20]);
    assert_eq!(ended.expect(0).text(), "xxx");
}

#[test]
fn who_writes_to_a_reader_that_left_is_told() {
    let mut child = husk_run(&guests!(), &[archive(), "yes"]).spawn().unwrap();
    drop(child.stdout.take());
    // SIGPIPE's number is 13.
    assert_eq!(crate::end_of(&mut child).and_then(|status| status.code()), Some(141));
}

#[test]
fn a_terminal_has_a_size_and_is_edited_by_the_guest() {
    let guests = guests!();
    let mut terminal = Terminal::start(husk_run(&guests, &["-it", archive(), "sh"]));
    terminal.resize(31, 97);
    terminal.wait_for("# ");
    assert!(!terminal.modes().canonical(), "the guest's terminal edits lines, ours is raw");
    terminal.type_keys(b"echo size=$(stty size) $(tty)\n");
    terminal.wait_for("size=31 97 /dev/pts/0");
    terminal.resize(40, 100);
    std::thread::sleep(Duration::from_millis(500));
    terminal.type_keys(b"echo size=$(stty size)\n");
    terminal.wait_for("size=40 100");
    // The guest's terminal makes a signal of it, for what runs there.
    terminal.type_keys(b"echo slee''ping; sleep 1000\n");
    terminal.wait_for("sleeping");
    std::thread::sleep(Duration::from_secs(1));
    terminal.type_keys(b"\x03");
    terminal.type_keys(b"echo inter''rupted\n");
    terminal.wait_for("interrupted");
    terminal.type_keys(b"exit 5\n");
    assert_eq!(terminal.wait(), Some(5));
    assert!(terminal.modes().canonical(), "the terminal is as it was");
}

#[test]
fn a_terminal_without_input_is_one_all_the_same() {
    let text = shell(&guests!(), &["-t"], "tty; stty size; test -t 2 && echo both").expect(0).text();
    assert_eq!(text.replace('\r', ""), "/dev/pts/0\n24 80\nboth\n");
}
