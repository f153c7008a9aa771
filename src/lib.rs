//! husk: the thinnest shell around a Linux kernel.
pub mod backend;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod console;
pub mod device;
pub mod guest;
pub mod irq;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod resources;
pub mod sandbox;
pub mod sys;
pub mod vcpu;
pub mod virtio;
