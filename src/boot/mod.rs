//! Which loader: puts a kernel, its initial RAM disk, its command line and its tables into guest memory.
//!
//! What stands here is x86: it is called once, before any vCPU runs, on the thread that builds the machine.

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit boot protocol (boot.rst): long mode, first 4 GiB mapped one to one, RSI holds the zero page's address.
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX holds the `hvm_start_info`'s address.
    Pvh,
}

/// Where the first vCPU starts, and what it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The state that the vCPU is to be in.
    pub protocol: Protocol,
    /// Guest physical address of the first instruction.
    pub instruction: u64,
    /// Guest physical address of the zero page or of the `hvm_start_info`.
    pub info: u64,
}
