//! husk on tiny guests, as its users run it. Needs /dev/kvm, of whatever vendor: the tests skip, aloud, where it is missing.
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
mod disk;
mod full_disk;
mod kernel;
mod life;
mod machine;
mod release;
mod unread;
