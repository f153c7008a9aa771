//! husk on tiny guests, as its users run it. Needs /dev/kvm, of whatever vendor: the tests skip, aloud, where it is missing.
//!
//! `HUSK_TEST_REQUIRE_KVM=1` fails them instead.

#[macro_use]
mod husk;
mod terminal;

mod background;
mod console;
mod cpus;
mod disk;
mod full_disk;
mod life;
mod machine;
