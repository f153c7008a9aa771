//! From a jump to the BIOS to the reset register: what a kernel that restarts by the BIOS finds at the reset vector.
//!
//! Linux does that on a hardware-reduced platform, which it takes for one with EFI, when no `reboot=` says otherwise. It
//! arrives in real mode, at F000:FFF0. Without this it would run through zeroes for ever.

use anyhow::Result;

use crate::layout;
use crate::memory::GuestMemory;

/// Writes the few instructions that reset the machine.
pub fn write(memory: &GuestMemory) -> Result<()> {
    super::write(memory, layout::RESET_VECTOR_ADDRESS, &instructions())
}

fn instructions() -> [u8; 9] {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    #[rustfmt::skip]
    let instructions = [
        0xba, low, high, // mov dx, RESET_PORT
        0xb0, layout::RESET_VALUE, // mov al, RESET_VALUE
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to hlt
    ];
    instructions
}
