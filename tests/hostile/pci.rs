//! Configuration registers, message tables and BARs as no driver writes them.

use crate::arena::{DISK_BYTES, machine, rounds, survives};
use crate::husk::disk_image;
use husk_guests as guests;

#[track_caller]
fn functions(words: &str, cpus: &str) {
    let (dir, _) = disk_image(DISK_BYTES);
    survives(machine(guests::FUNCTIONS, words, "pci", dir.path()).flag("--cpus", cpus));
}

#[test]
fn a_table_of_messages_may_contain_anything() {
    needs_kvm!();
    functions(&format!("do=table {}", rounds(2000)), "1");
}

#[test]
fn configuration_registers_take_any_access() {
    needs_kvm!();
    functions(&format!("do=config {}", rounds(20_000)), "1");
}

#[test]
fn functions_may_move_onto_each_other_while_they_are_used() {
    needs_kvm!();
    functions(&format!("do=bars {}", rounds(1000)), "2");
}
