//! The host side of devices.
