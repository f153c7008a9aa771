//! Code at the reset vector that resets the machine, for kernels that reboot through the BIOS.
//!
//! Without a `reboot=` parameter, Linux does that on a hardware-reduced platform, after trying EFI. It arrives in real
//! mode, at F000:FFF0. Without this code it would execute zeroes forever.

use anyhow::Result;

use crate::layout;
use crate::memory::GuestMemory;

/// Writes the instructions that reset the machine.
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
