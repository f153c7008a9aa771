//! Queues in impossible places, with impossible contents, and under impossible conditions: on every device, over both buses.

use crate::arena::{DISK_BYTES, machine, on_both_buses, rounds, survives};
use crate::husk::disk_image;
use husk_guests as guests;

#[test]
fn only_offered_features_are_accepted() {
    needs_kvm!();
    on_both_buses(guests::STORM, "do=features");
}

#[test]
fn a_queue_in_an_impossible_place_needs_a_reset() {
    needs_kvm!();
    on_both_buses(guests::STORM, "do=places");
}

#[test]
fn an_impossible_chain_needs_a_reset() {
    needs_kvm!();
    on_both_buses(guests::STORM, "do=chains");
}

#[test]
fn random_queues_harm_nothing() {
    needs_kvm!();
    for seed in 1..4 {
        on_both_buses(guests::STORM, &format!("do=chaos seed={seed} {}", rounds(100)));
    }
}

#[test]
fn a_reset_ends_what_is_under_way() {
    needs_kvm!();
    on_both_buses(guests::STORM, &format!("do=resets {}", rounds(100)));
}

#[test]
fn storms_of_doorbells_harm_nothing() {
    needs_kvm!();
    on_both_buses(guests::STORM, &format!("do=doorbells {}", rounds(5000)));
}

#[test]
fn descriptors_may_change_while_they_are_used() {
    needs_kvm!();
    for transport in ["mmio", "pci"] {
        let (dir, _) = disk_image(DISK_BYTES);
        let words = format!("do=race {}", rounds(300));
        survives(machine(guests::STORM, &words, transport, dir.path()).flag("--cpus", "2"));
    }
}
