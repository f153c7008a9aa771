//! The host side of devices.
pub mod disk;
