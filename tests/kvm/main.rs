//! End-to-end tests with tiny guests. They require /dev/kvm on any processor, and are skipped with a visible message
//! without it.
//!
//! `HUSK_TEST_REQUIRE_KVM=1` fails them instead.

#[macro_use]
mod husk;
#[allow(dead_code)]
#[path = "../../src/boot/sample.rs"]
mod sample;
mod terminal;

mod background;
mod console;
mod cpus;
mod datagrams;
mod disk;
mod full_disk;
mod journal;
mod kernel;
mod killed;
mod life;
mod machine;
mod many;
mod own_network;
mod release;
mod sandbox;
mod snapshot;
mod snapshot_busy;
mod snapshot_diff;
mod snapshot_disks;
mod snapshot_killed;
mod steady;
mod unread;
