//! husk: the thinnest shell around a Linux kernel.
pub mod backend;
pub mod bench;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod console;
pub mod decompress;
pub mod device;
pub mod exit_latch;
pub mod foreign;
pub mod guest;
pub mod image;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod request;
pub mod resources;
pub mod roster;
pub mod sandbox;
pub mod sys;
#[cfg(test)]
mod test_log;
pub mod timings;
pub mod vcpu;
pub mod virtio;
