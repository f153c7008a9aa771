//! From KVM_RUN to a device, or to the machine's end: the only place that looks at a vCPU's exit.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Buses;
use crate::exit_latch::ExitReason;

/// What is to be done after a KVM_RUN.
pub enum Step {
    /// Run on.
    Continue,
    /// Run on when the console has room again.
    WaitForConsole,
    /// A signal came: see what is wanted, then run on.
    Interrupted,
    /// The guest can run no more on this vCPU.
    End(End),
}

/// Why a guest can run no more.
pub enum End {
    /// It shut the processor down.
    TripleFault { rip: Option<u64> },
    /// It switched the machine off by a firmware call.
    PoweredOff,
    /// It reset the machine by a firmware call.
    Reset,
    /// KVM gave up.
    KvmError(String),
}

impl End {
    /// The machine's reason when vCPU `vcpu` ends so.
    pub fn reason(self, vcpu: u32) -> ExitReason {
        match self {
            End::TripleFault { rip } => ExitReason::TripleFault { vcpu, rip },
            End::PoweredOff => ExitReason::PoweredOff,
            End::Reset => ExitReason::Reset,
            End::KvmError(reason) => ExitReason::KvmError { vcpu, reason },
        }
    }
}

/// Runs the guest up to its next exit, and serves it.
pub fn step(fd: &mut VcpuFd, buses: &Buses) -> Step {
    match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            let data = data.to_vec();
            let mut is_behind = false;
            for unit in data.chunks(port_width(fd)) {
                is_behind = buses.ports.write(u64::from(port), unit);
            }
            if is_behind { Step::WaitForConsole } else { Step::Continue }
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            let data = detached(data);
            for unit in data.chunks_mut(port_width(fd)) {
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

/// Takes note of a kick. From here on the next one counts, so that what it is about is to be looked for after this.
fn interrupted(fd: &mut VcpuFd) -> Step {
    fd.set_kvm_immediate_exit(0);
    Step::Interrupted
}

/// Completes the vCPU's last exit without running the guest, so that its registers are those of an instruction's
/// boundary (KVM API, KVM_RUN: an exit for I/O is complete only after the next KVM_RUN). An instruction that makes several
/// accesses, as `rep outsb` does, has its next exits served here. Returns why the guest can run no more, if so.
pub fn finish(fd: &mut VcpuFd, buses: &Buses) -> Option<End> {
    loop {
        fd.set_kvm_immediate_exit(1);
        match step(fd, buses) {
            Step::Continue | Step::WaitForConsole => {}
            Step::Interrupted => return None,
            Step::End(why) => return Some(why),
        }
    }
}

/// Has a kick of the calling thread reach KVM_RUN of `fd` wherever it comes: inside it interrupts the guest, outside it has
/// the next KVM_RUN return at once (KVM API, `immediate_exit`). To be called on the vCPU's thread, which drops the aim before
/// it closes `fd`.
pub fn aim_kicks_at(fd: &mut VcpuFd) -> Aim {
    KICKED.set(&raw mut fd.get_kvm_run().immediate_exit);
    Aim(PhantomData)
}

/// Where kicks of this thread go. Without it they do nothing: a thread may be kicked until it is gone.
pub struct Aim(PhantomData<*const ()>);

impl Drop for Aim {
    fn drop(&mut self) {
        KICKED.set(ptr::null_mut());
    }
}

/// What the signal of a kick does. Async-signal-safe.
pub extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = KICKED.get();
    if !flag.is_null() {
        // SAFETY: the flag is this thread's own and lies in the mapping of its `kvm_run`, which stays for as long as kicks are
        // aimed at it (see `aim_kicks_at`); the kernel alone reads it, at the start of KVM_RUN. The thread is here, so that it
        // does nothing else with it.
        unsafe { flag.write_volatile(1) };
    }
}

thread_local! {
    /// The flag that has this thread's KVM_RUN return at once; null where the thread runs no vCPU.
    static KICKED: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// An exit's data apart from the borrow of the vCPU it came with.
fn detached<'a>(data: &mut [u8]) -> &'a mut [u8] {
    // SAFETY: `data` lies in the vCPU's `kvm_run` mapping, which stays until the `VcpuFd` is dropped; `step`, the only
    // caller, holds that `VcpuFd` for as long as it uses the slice and lets nobody else at the data meanwhile.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), data.len()) }
}

/// The width in bytes of one access of the port I/O exit that was just taken: a string instruction makes many at once.
fn port_width(fd: &mut VcpuFd) -> usize {
    // SAFETY: the exit was KVM_EXIT_IO, for which KVM fills this member of the union.
    let width = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(width).max(1)
}

/// Where the vCPU stands, for a message; 0 if KVM does not say.
fn rip(fd: &VcpuFd) -> u64 {
    fd.get_regs().map_or(0, |regs| regs.rip)
}

/// Where the vCPU stood when it shut down; `None` where that is lost: on AMD the processor leaves its state undefined,
/// so that KVM puts the vCPU to the reset vector (AMD APM volume 2, §15.14.3).
fn rip_before_shutdown(fd: &VcpuFd) -> Option<u64> {
    const RESET_VECTOR: u64 = 0xfff0;
    Some(rip(fd)).filter(|rip| *rip != RESET_VECTOR)
}

/// KVM's words on an internal error: which, where, and the bytes of the instruction where it gives them.
fn internal_error(fd: &mut VcpuFd) -> String {
    let at = rip(fd);
    let run: &kvm_run = fd.get_kvm_run();
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills `internal`; `emulation_failure` overlays it, and
    // all its fields are plain integers.
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
