//! The generation ID (Microsoft, "Virtual Machine Generation ID"): a random number in guest memory, which differs between
//! machines that continue from one state. When it changes, Linux (drivers/virt/vmgenid.c) reseeds its random numbers.

use anyhow::{Context, Result};

use crate::layout;
use crate::memory::GuestMemory;
use crate::sys;

/// Writes a new ID. A guest that was told of its address is to be notified by an interrupt
/// ([`layout::GENERATION_GSI`]).
pub fn write(memory: &GuestMemory) -> Result<()> {
    let mut id = [0; 16];
    sys::getrandom(&mut id).context("getrandom")?;
    super::write(memory, layout::GENERATION_ADDRESS, &id).context("write the generation ID")
}
