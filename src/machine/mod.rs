//! The machine.
pub mod layout;
