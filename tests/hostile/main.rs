//! Guests with full control of their kernel, which break every rule that they can: each harms nothing but itself. They are tiny
//! and run on any /dev/kvm; without it the tests are skipped with a visible message, or fail with
//! `HUSK_TEST_REQUIRE_KVM=1`.

#[macro_use]
#[allow(dead_code)]
#[path = "../kvm/husk.rs"]
mod husk;

#[path = "../kvm/own_network.rs"]
mod own_network;
#[allow(dead_code)]
#[path = "../run/uplink.rs"]
mod uplink;

mod arena;
mod balloon;
mod console;
mod folder;
mod frames;
mod init;
mod noise;
mod pci;
mod queues;
mod vsock;
