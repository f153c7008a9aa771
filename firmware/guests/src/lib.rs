//! Tiny guests, assembled by the build: kernels of a few hundred instructions that tests boot like Linux.
//!
//! Each constant is the path of an ELF kernel for the 64-bit boot protocol. A guest's task is selected by its command
//! line (`do=…`); it prints to the serial port and ends with an exit code: 0, or one of those below.

/// A check of the machine failed; the serial output says which.
pub const EXIT_CHECK_FAILED: i32 = 90;
/// An unexpected exception.
pub const EXIT_EXCEPTION: i32 = 91;
/// An unknown task on the command line.
pub const EXIT_BAD_COMMAND_LINE: i32 = 92;
/// A required device or kvm-clock is missing.
pub const EXIT_MISSING: i32 = 93;

/// Ends with exit code 42 after three instructions.
pub const EXIT: &str = concat!(env!("OUT_DIR"), "/exit.elf");
/// Prints one byte and resets, which ends any VMM.
pub const BRIEF: &str = concat!(env!("OUT_DIR"), "/brief.elf");
/// The ways in which a machine ends.
pub const POWER: &str = concat!(env!("OUT_DIR"), "/power.elf");
/// Prints its command line and its initramfs.
pub const LOADED: &str = concat!(env!("OUT_DIR"), "/loaded.elf");
/// Port I/O and MMIO of every width, on holes and on device registers.
pub const IO: &str = concat!(env!("OUT_DIR"), "/io.elf");
/// Touches both ends of every range in the memory map.
pub const MEMORY: &str = concat!(env!("OUT_DIR"), "/memory.elf");
/// Starts further vCPUs by INIT and SIPI.
pub const PROCESSORS: &str = concat!(env!("OUT_DIR"), "/processors.elf");
/// Keeps all vCPUs busy until the machine is ended.
pub const BUSY: &str = concat!(env!("OUT_DIR"), "/busy.elf");
/// kvm-clock, the APIC timer and the TSC deadline.
pub const CLOCK: &str = concat!(env!("OUT_DIR"), "/clock.elf");
/// Floods the serial port, prints a prompt, or echoes input.
pub const SERIAL: &str = concat!(env!("OUT_DIR"), "/serial.elf");
/// Sends a disk all requests that a driver can make.
pub const BLOCK: &str = concat!(env!("OUT_DIR"), "/block.elf");
/// Violates every rule of a disk's ring.
pub const HOSTILE: &str = concat!(env!("OUT_DIR"), "/hostile.elf");
/// Accesses everything that is not memory, at every width and alignment.
pub const NOISE: &str = concat!(env!("OUT_DIR"), "/noise.elf");
/// Breaks the rules of queues on every device, over MMIO and PCI.
pub const STORM: &str = concat!(env!("OUT_DIR"), "/storm.elf");
/// Tells the balloon lies.
pub const PAGES: &str = concat!(env!("OUT_DIR"), "/pages.elf");
/// Sends vsock packets that a driver must not send.
pub const PACKETS: &str = concat!(env!("OUT_DIR"), "/packets.elf");
/// Sends network frames that a driver must not send.
pub const FRAMES: &str = concat!(env!("OUT_DIR"), "/frames.elf");
/// Speaks FUSE to a shared folder by itself, against its rules.
pub const FOLDER: &str = concat!(env!("OUT_DIR"), "/folder.elf");
/// Breaks the rings of a network device that the host's kernel serves.
pub const VHOST: &str = concat!(env!("OUT_DIR"), "/vhost.elf");
/// Speaks the protocol of husk's init, against its rules.
pub const LIAR: &str = concat!(env!("OUT_DIR"), "/liar.elf");
/// Configures PCI functions as no driver does.
pub const FUNCTIONS: &str = concat!(env!("OUT_DIR"), "/functions.elf");
/// Reads random bytes.
pub const ENTROPY: &str = concat!(env!("OUT_DIR"), "/entropy.elf");
/// Measures the cost of an exit.
pub const TRIPS: &str = concat!(env!("OUT_DIR"), "/trips.elf");
/// Measures a disk or a network with a driver at CPL 3.
pub const DRIVE: &str = concat!(env!("OUT_DIR"), "/drive.elf");

/// Loads a disk, its timers and three vCPUs, and checks that nothing is lost or done twice.
pub const STEADY: &str = concat!(env!("OUT_DIR"), "/steady.elf");

/// The guest with this name: `exit`, `power`, …
pub fn path(name: &str) -> Option<std::path::PathBuf> {
    let path = std::path::Path::new(env!("OUT_DIR")).join(name).with_extension("elf");
    (!name.contains('/') && path.exists()).then_some(path)
}
