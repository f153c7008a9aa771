//! Faults of the host: each system call of a machine fails in each way that it can, and a signal arrives before each of them.
//! husk ends with one line, or goes on; what its guest has flushed is on the disk, and nothing is left behind.
//!
//! A sample is tried, a different one each time; `HUSK_TEST_FAULTS=all` (`scripts/faults`) tries everything.

#[macro_use]
#[allow(dead_code)]
#[path = "../kvm/husk.rs"]
mod husk;

#[path = "../kvm/journal.rs"]
mod journal;

mod calls;
mod sweep;
mod tracer;
