//! The virtio core and its devices.
