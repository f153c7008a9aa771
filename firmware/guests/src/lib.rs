//! Tiny guests, assembled by the build: kernels of a few hundred instructions that a test boots as a user boots Linux.
//!
//! Each constant is the path of an ELF kernel for the 64-bit boot protocol. A guest is told what to do by its command
//! line (`do=…`), speaks on the serial port, and ends with an exit code: 0, or one of those below.

/// A claim that the guest made of its machine did not hold; the serial output says which.
pub const EXIT_CHECK_FAILED: i32 = 90;
/// An exception that the guest had not asked for.
pub const EXIT_EXCEPTION: i32 = 91;
/// The guest does not know what it was told to do.
pub const EXIT_BAD_COMMAND_LINE: i32 = 92;
/// The machine has not what the guest needs: a device, or kvm-clock.
pub const EXIT_MISSING: i32 = 93;

/// Ends with exit code 42 after three instructions.
pub const EXIT: &str = concat!(env!("OUT_DIR"), "/exit.elf");
/// The ways a machine ends or does not.
pub const POWER: &str = concat!(env!("OUT_DIR"), "/power.elf");
/// Prints its command line and its initial RAM disk.
pub const LOADED: &str = concat!(env!("OUT_DIR"), "/loaded.elf");
/// Port I/O and MMIO of every width, on holes and on device registers.
pub const IO: &str = concat!(env!("OUT_DIR"), "/io.elf");
/// Touches both ends of all memory of the memory map.
pub const MEMORY: &str = concat!(env!("OUT_DIR"), "/memory.elf");
/// Starts further vCPUs by INIT and SIPI.
pub const PROCESSORS: &str = concat!(env!("OUT_DIR"), "/processors.elf");
/// Keeps all its vCPUs busy until it is ended.
pub const BUSY: &str = concat!(env!("OUT_DIR"), "/busy.elf");
/// kvm-clock, the APIC timer and the TSC deadline.
pub const CLOCK: &str = concat!(env!("OUT_DIR"), "/clock.elf");
/// A flood on the serial port, a prompt, or an echo of the input.
pub const SERIAL: &str = concat!(env!("OUT_DIR"), "/serial.elf");
/// Asks a disk for everything a driver may ask.
pub const BLOCK: &str = concat!(env!("OUT_DIR"), "/block.elf");
/// Breaks every rule of a disk's ring.
pub const HOSTILE: &str = concat!(env!("OUT_DIR"), "/hostile.elf");
/// Reads random bytes.
pub const ENTROPY: &str = concat!(env!("OUT_DIR"), "/entropy.elf");
/// Measures what an exit costs.
pub const TRIPS: &str = concat!(env!("OUT_DIR"), "/trips.elf");
/// Measures a disk with a driver at CPL 3.
pub const DRIVE: &str = concat!(env!("OUT_DIR"), "/drive.elf");

/// The guest of this name, for programs that are told it: `exit`, `power`, …
pub fn path(name: &str) -> Option<std::path::PathBuf> {
    let path = std::path::Path::new(env!("OUT_DIR")).join(name).with_extension("elf");
    (!name.contains('/') && path.exists()).then_some(path)
}
