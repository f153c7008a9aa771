//! Handles VM exits: dispatches them to devices or ends the machine. No other module inspects a vCPU's exit.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Buses;
use crate::exit_latch::ExitReason;

/// The next action after a KVM_RUN.
pub enum Step {
    /// Run the guest again.
    Continue,
    /// Run the guest again once the console has room.
    WaitForConsole,
    /// A signal arrived: check for commands, then run the guest again.
    Interrupted,
    /// This vCPU cannot run any further.
    End(End),
}

/// Why a vCPU cannot run any further.
pub enum End {
    /// The guest shut the processor down.
    TripleFault { rip: Option<u64> },
    /// The guest powered the machine off by a firmware call.
    PoweredOff,
    /// The guest reset the machine by a firmware call.
    Reset,
    /// KVM returned an error.
    KvmError(String),
}

impl End {
    /// The machine's exit reason for this end of vCPU `vcpu`.
    pub fn reason(self, vcpu: u32) -> ExitReason {
        match self {
            End::TripleFault { rip } => ExitReason::TripleFault { vcpu, rip },
            End::PoweredOff => ExitReason::PoweredOff,
            End::Reset => ExitReason::Reset,
            End::KvmError(reason) => ExitReason::KvmError { vcpu, reason },
        }
    }
}

/// Runs the guest until its next exit and handles it.
pub fn step(fd: &mut VcpuFd, buses: &Buses) -> Step {
    match fd.run() {
        Ok(VcpuExit::IoOut(port, _)) => {
            let mut is_behind = false;
            for unit in port_accesses(fd) {
                is_behind = buses.ports.write(u64::from(port), unit);
            }
            if is_behind { Step::WaitForConsole } else { Step::Continue }
        }
        Ok(VcpuExit::IoIn(port, _)) => {
            for unit in port_accesses(fd) {
                buses.ports.read(u64::from(port), unit);
            }
            Step::Continue
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.memory.read(address, data);
            Step::Continue
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.memory.write(address, data);
            Step::Continue
        }
        Ok(VcpuExit::Intr) => interrupted(fd),
        Ok(VcpuExit::Shutdown) => Step::End(End::TripleFault { rip: rip_before_shutdown(fd) }),
        Ok(VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Step::End(End::PoweredOff),
        Ok(VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _)) => Step::End(End::Reset),
        Ok(VcpuExit::InternalError) => Step::End(End::KvmError(internal_error(fd))),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            let at = rip(fd);
            Step::End(End::KvmError(format!("entry failed on host CPU {cpu}, hardware reason {reason:#x}, at {at:#x}")))
        }
        Ok(other) => {
            let exit = format!("{other:?}");
            Step::End(End::KvmError(format!("unexpected exit {exit} at {:#x}", rip(fd))))
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => interrupted(fd),
        Err(e) => Step::End(End::KvmError(format!("KVM_RUN: {e} at {:#x}", rip(fd)))),
    }
}

/// Acknowledges a kick. Later kicks count again, so commands must be checked after this call.
fn interrupted(fd: &mut VcpuFd) -> Step {
    fd.set_kvm_immediate_exit(0);
    Step::Interrupted
}

/// Completes the vCPU's last exit without running the guest, so that its registers are at an instruction boundary (KVM
/// API, KVM_RUN: an I/O exit is complete only after the next KVM_RUN). Further exits of an instruction with several
/// accesses, such as `rep outsb`, are handled here. Returns the reason if the vCPU cannot run any further.
pub fn complete_last(fd: &mut VcpuFd, buses: &Buses) -> Option<End> {
    loop {
        fd.set_kvm_immediate_exit(1);
        match step(fd, buses) {
            Step::Continue | Step::WaitForConsole => {}
            Step::Interrupted => return None,
            Step::End(why) => return Some(why),
        }
    }
}

/// Makes kicks of the calling thread reach KVM_RUN of `fd` at any time: within KVM_RUN a kick interrupts the guest,
/// otherwise it makes the next KVM_RUN return immediately (KVM API, `immediate_exit`). Must be called on the vCPU's
/// thread, which drops the returned guard before it closes `fd`.
pub fn aim_kicks_at(fd: &mut VcpuFd) -> Aim {
    KICKED.set(&raw mut fd.get_kvm_run().immediate_exit);
    Aim(PhantomData)
}

/// Directs this thread's kicks to a vCPU. Without it kicks do nothing: a thread may be kicked until it has exited.
pub struct Aim(PhantomData<*const ()>);

impl Drop for Aim {
    fn drop(&mut self) {
        KICKED.set(ptr::null_mut());
    }
}

/// The signal handler of a kick. Async-signal-safe.
pub extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = KICKED.get();
    if !flag.is_null() {
        // SAFETY: the flag belongs to this thread and lies in the mapping of its `kvm_run`, which exists as long as
        // kicks are directed at it (see `aim_kicks_at`). Only the kernel reads it, at the start of KVM_RUN, and this
        // thread is in the handler, so it does not access the flag otherwise.
        unsafe { flag.write_volatile(1) };
    }
}

thread_local! {
    /// The flag that makes this thread's KVM_RUN return immediately; null if the thread runs no vCPU.
    static KICKED: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The data of the current port I/O exit, access by access: a string instruction makes many accesses at once, which
/// `VcpuExit` returns as one slice without their width.
fn port_accesses(fd: &mut VcpuFd) -> impl Iterator<Item = &mut [u8]> {
    let run = fd.get_kvm_run();
    // SAFETY: the exit was KVM_EXIT_IO, for which KVM fills this member of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size);
    // SAFETY: KVM puts `count` accesses of `size` bytes at that offset in the mapping of `kvm_run` (KVM API,
    // KVM_EXIT_IO), and accesses it only within KVM_RUN. The mapping lives as long as `fd`, which is borrowed
    // meanwhile.
    let data = unsafe {
        let at = ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(at, width * io.count as usize)
    };
    data.chunks_mut(width.max(1))
}

/// The vCPU's instruction pointer for a message; 0 if KVM does not provide it.
fn rip(fd: &VcpuFd) -> u64 {
    fd.get_regs().map_or(0, |regs| regs.rip)
}

/// The instruction pointer at shutdown. `None` if it is lost: on AMD the processor leaves its state undefined, so KVM
/// resets the vCPU to the reset vector (AMD APM volume 2, §15.14.3).
fn rip_before_shutdown(fd: &VcpuFd) -> Option<u64> {
    const RESET_VECTOR: u64 = 0xfff0;
    Some(rip(fd)).filter(|rip| *rip != RESET_VECTOR)
}

/// Describes a KVM internal error: its kind, its address, and the instruction bytes if available.
fn internal_error(fd: &mut VcpuFd) -> String {
    let at = rip(fd);
    let run: &kvm_run = fd.get_kvm_run();
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills `internal`; `emulation_failure` overlays it,
    // and all of its fields are plain integers.
    let (suberror, failure) =
        unsafe { (run.__bindgen_anon_1.internal.suberror, run.__bindgen_anon_1.emulation_failure) };
    if suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
        return format!("internal error {suberror} at {at:#x}");
    }
    let has_bytes = failure.ndata >= 3
        && failure.flags & u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    // SAFETY: this union has one member.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let length = if has_bytes { usize::from(instruction.insn_size).min(instruction.insn_bytes.len()) } else { 0 };
    let bytes: String = instruction.insn_bytes.iter().take(length).map(|byte| format!(" {byte:02x}")).collect();
    format!(
        "an instruction at {at:#x} could not be emulated:{}",
        if bytes.is_empty() { " bytes unknown" } else { &bytes }
    )
}
