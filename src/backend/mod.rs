//! The host side of devices.
pub mod disk;
pub mod net;
pub mod rate;
