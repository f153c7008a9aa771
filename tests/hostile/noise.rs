//! Accesses to everything that is not memory, with any width, alignment and value.

use crate::arena::{DISK_BYTES, machine, on_both_buses, rounds, survives};
use crate::husk::{disk_image, is_emulated};
use husk_guests as guests;

#[test]
fn registers_take_any_access() {
    needs_kvm!();
    // Every access takes a VM exit, and a hundred times as long on an emulated processor.
    on_both_buses(guests::NOISE, if is_emulated() { "do=registers part=10" } else { "do=registers" });
}

#[test]
fn ports_take_any_access() {
    needs_kvm!();
    on_both_buses(guests::NOISE, &format!("do=ports {}", rounds(10_000)));
}

#[test]
fn holes_in_the_address_space_take_any_access() {
    needs_kvm!();
    on_both_buses(guests::NOISE, &format!("do=holes {}", rounds(10_000)));
}

#[test]
fn cpuid_has_an_answer_to_any_leaf() {
    needs_kvm!();
    let (dir, _) = disk_image(DISK_BYTES);
    survives(machine(guests::NOISE, &format!("do=cpuid {}", rounds(5000)), "mmio", dir.path()));
}

#[test]
fn model_specific_registers_take_any_value_or_refuse_it() {
    needs_kvm!();
    let (dir, _) = disk_image(DISK_BYTES);
    survives(machine(guests::NOISE, &format!("do=msrs {}", rounds(5000)), "mmio", dir.path()));
}
