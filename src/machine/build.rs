//! Builds a machine from its configuration and opened resources, paused before its first instruction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};

use super::{Console, Controls, Machine, MachineState, virtio_bus};
use crate::boot::{self, EntryPoint, Kernel, Part};
use crate::config::{self, MachineConfig};
use crate::device::{Power, Serial};
use crate::exit_latch::ExitLatch;
use crate::irq::IrqLine;
use crate::kvm::{self, Vm};
use crate::layout::{self, VirtioBus};
use crate::memory::{self, GuestMemory};
use crate::resources::disk::DiskFile;
use crate::resources::net::Network;
use crate::resources::share::SharedFolder;
use crate::resources::vsock::VsockSocket;
use crate::resources::{BootFiles, Resources, SnapshotFiles, Source};
use crate::sandbox::{self, ThreadRole};
use crate::timings::{Step, Timings};
use crate::vcpu::cpuid::{self, Processor};
use crate::vcpu::{self, Buses, InStep, VcpuThread, setup};
use crate::virtio::{VirtioDevice, balloon, block, fs, net, rng, vsock};

impl Machine {
    /// Builds the machine described by `config` from `resources`, which it consumes. No path is opened, and no guest
    /// instruction runs before [`Machine::resume`].
    ///
    /// The kernel is loaded on a separate thread, since that takes as long as KVM's setup: on a host whose KVM creates a
    /// kernel thread for each machine, KVM_CREATE_VM waits for an RCU grace period of some milliseconds. Otherwise the order
    /// follows dependencies: memory slots precede the interrupt controller (see [`Vm::new`]); every device is on the bus
    /// before the first vCPU exists.
    ///
    /// A machine from a snapshot is built the same way, but nothing is loaded: its memory is that of the file ([`memory::map`]), each
    /// vCPU gets its state when it is created, and devices and interrupt controller before it is returned.
    ///
    /// `confine` is called before the threads that run for the guest are started. All guest memory is allocated with
    /// `--prefault`, until `is_interrupted` returns true.
    pub fn build(
        config: &MachineConfig,
        resources: Resources,
        timings: Arc<Timings>,
        confine: impl FnOnce() -> Result<()>,
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Machine> {
        let Resources { kvm, source, disks, vsock, networks, shares } = resources;
        let kvm = Arc::new(kvm);
        let prefault = config.prefault.then_some(is_interrupted);
        let mut added_devices = 0;
        let (memory, loader) = match source {
            Source::Boot(files) => {
                let memory = memory::create(config.memory_mib, config.huge_pages.pages(), prefault)?;
                let contents = Contents::new(config, *files);
                (memory.clone(), Loader::boot(kvm.clone(), memory, contents, timings.clone())?)
            }
            Source::Snapshot(SnapshotFiles { state, memory, touched, added_devices: added, .. }) => {
                added_devices = added;
                let memory = memory::map(config.memory_mib, &memory, config.huge_pages.pages(), prefault)?;
                let loader = Loader::restore(kvm.clone(), state, memory.clone(), touched, timings.clone())?;
                (memory, loader)
            }
        };
        let (devices, controls) = create_devices(config, disks, vsock, networks, shares)?;

        let vm = Vm::new(kvm, &memory)?;
        let exit_latch = Arc::new(ExitLatch::new()?);
        let mut buses = Buses::default();
        let console = attach_console(&vm, &mut buses, &exit_latch, &timings)?;
        Power::new(exit_latch.clone(), timings.clone()).attach(&mut buses.ports)?;
        let power_button = IrqLine::new(layout::EVENT_GSI)?;
        vm.connect_irq(&power_button)?;
        confine()?;
        let transports = virtio_bus::attach(&vm, &mut buses, &memory, config.virtio_bus(), devices)?;
        timings.mark(Step::KvmReady);

        let buses = Arc::new(buses);
        let start = |prepare: &Prepare<'_>| start_vcpus(&vm, config.cpus, &buses, &exit_latch, prepare);
        let (vcpus, saved) = match loader.finish()? {
            Loaded::Kernel(entry, supported) => (boot_vcpus(config, &vm, entry, &supported, &start)?, None),
            Loaded::State(state, supported) => (restored_vcpus(config, &vm, &state, &supported, &start)?, Some(state)),
        };
        let vm = Arc::new(vm);
        let mut machine = Machine { vcpus, transports, controls, console, power_button, exit_latch, timings, vm };
        saved.iter().try_for_each(|state| machine.restore(state, added_devices))?;
        Ok(machine)
    }
}

/// Sets the first state of a vCPU, given by its index.
type Prepare<'a> = dyn Fn(&VcpuFd, u32) -> Result<()> + 'a;

fn boot_vcpus(
    config: &MachineConfig,
    vm: &Vm,
    entry: EntryPoint,
    supported: &CpuId,
    start: &dyn Fn(&Prepare<'_>) -> Result<Vec<VcpuThread>>,
) -> Result<Vec<VcpuThread>> {
    ensure!(
        !config.nested || cpuid::can_nest(supported),
        "KVM on this host does not support nested virtualization: enable it with `sudo modprobe kvm_intel nested=1` (or \
         kvm_amd), or remove --nested"
    );
    let processor = Processor { cpus: config.cpus, tsc_deadline: vm.has_tsc_deadline(), nested: config.nested };
    start(&|fd, index| setup::prepare(fd, &cpuid::for_vcpu(supported, processor, index), (index == 0).then_some(entry)))
}

fn restored_vcpus(
    config: &MachineConfig,
    vm: &Vm,
    state: &MachineState,
    supported: &CpuId,
    start: &dyn Fn(&Prepare<'_>) -> Result<Vec<VcpuThread>>,
) -> Result<Vec<VcpuThread>> {
    let (found, expected) = (state.vcpus.len(), config.cpus);
    ensure!(found == expected as usize, "the saved machine has {found} vCPUs, not {expected}");
    let processor = Processor { cpus: config.cpus, tsc_deadline: vm.has_tsc_deadline(), nested: config.nested };
    let in_step = InStep::default();
    start(&|fd, index| {
        let vcpu = state.vcpus.get(index as usize).context("it has no state")?;
        if index == 0 {
            vcpu.ensure_suits(fd, &cpuid::for_vcpu(supported, processor, index))?;
        }
        vcpu.restore(fd, &in_step)
    })
}

/// Creates the virtio devices, in the order of their addresses, and the handles to them.
fn create_devices(
    config: &MachineConfig,
    disks: Vec<DiskFile>,
    vsock: Option<VsockSocket>,
    networks: Vec<Network>,
    shares: Vec<SharedFolder>,
) -> Result<(Vec<VirtioDevice>, Controls)> {
    let (mut devices, mut controls) = (Vec::new(), Controls::default());
    let early_disks = disks.len().saturating_sub(config.late_disks);
    let mut disks = disks.into_iter();
    add_disks(disks.by_ref().take(early_disks), &mut devices, &mut controls)?;
    devices.push(rng::device());
    // After the disks, because the names of devices in the guest depend on their order.
    if let Some(vsock) = vsock {
        devices.push(vsock::device(vsock).context("create the vsock device")?);
    }
    for network in networks {
        let (device, link) = net::device(network).context("create a network device")?;
        devices.push(device);
        controls.links.push(link);
    }
    if config.balloon {
        let target_mib = config.memory_target_mib.unwrap_or(config.memory_mib);
        let options = balloon::Options {
            memory_mib: config.memory_mib,
            target_mib,
            deflates_on_oom: config.balloon_deflates_on_oom,
            reports_free_pages: config.reports_free_pages(),
        };
        let (device, control) = balloon::device(options).context("create the balloon device")?;
        devices.push(device);
        controls.balloon = Some(control);
    }
    add_disks(disks, &mut devices, &mut controls)?;
    for share in shares {
        devices.push(fs::device(share).context("create a share's device")?);
    }
    Ok((devices, controls))
}

fn add_disks(
    disks: impl Iterator<Item = DiskFile>,
    devices: &mut Vec<VirtioDevice>,
    controls: &mut Controls,
) -> Result<()> {
    for disk in disks {
        let (device, control) = block::device(disk).context("create a disk device")?;
        devices.push(device);
        controls.disks.push(control);
    }
    Ok(())
}

fn cmdline(config: &MachineConfig, kernel_words: &str, has_initrd: bool) -> String {
    let cmdline = config.full_cmdline(kernel_words, has_initrd);
    log::info!("kernel command line: {cmdline}");
    if let Some(word) = config::hides_devices(&cmdline, config.virtio_bus()) {
        log::warn!(
            "the kernel parameter {word} hides all disks and networks, and perhaps secondary CPUs, from the \
             guest: remove {word}"
        );
    }
    cmdline
}

/// What is loaded into guest memory.
struct Contents {
    kernel: Kernel,
    initrd: Option<Part>,
    cmdline: String,
    cpus: u32,
    bus: VirtioBus,
}

impl Contents {
    fn new(config: &MachineConfig, files: BootFiles) -> Contents {
        let BootFiles { kernel, kernel_words, initrd } = files;
        let cmdline = cmdline(config, &kernel_words, initrd.is_some());
        Contents { kernel, cmdline, initrd, cpus: config.cpus, bus: config.virtio_bus() }
    }
}

/// What a machine's vCPUs start with.
enum Loaded {
    /// The entry point of the kernel in memory, and what CPUID may report.
    Kernel(EntryPoint, CpuId),
    /// The state of a machine whose memory is mapped, and what CPUID may report.
    State(Box<MachineState>, CpuId),
}

/// The thread that queries CPUID, and fills guest memory or decodes a saved state, while KVM is set up; and as long as
/// that takes provides memory. Dropping it waits until the thread has ended: it is not confined like those that run for the guest.
struct Loader {
    thread: Option<JoinHandle<Result<Loaded>>>,
    is_stopped: Arc<AtomicBool>,
}

impl Loader {
    fn boot(kvm: Arc<Kvm>, memory: GuestMemory, contents: Contents, timings: Arc<Timings>) -> Result<Loader> {
        let load = move || {
            let Contents { kernel, initrd, cmdline, cpus, bus } = contents;
            let entry = boot::load(&memory, &kernel, initrd.as_ref(), &cmdline, cpus, bus)?;
            setup::write_boot_tables(&memory, entry.protocol)?;
            timings.mark(Step::KernelLoaded);
            Ok(Loaded::Kernel(entry, kvm::supported_cpuid(&kvm)?))
        };
        Loader::start(|_| load())
    }

    fn restore(
        kvm: Arc<Kvm>,
        state: Vec<u8>,
        memory: GuestMemory,
        touched: Option<Vec<u8>>,
        timings: Arc<Timings>,
    ) -> Result<Loader> {
        Loader::start(move |is_stopped| {
            let state = MachineState::decode(&state)?;
            timings.mark(Step::KernelLoaded);
            let supported = kvm::supported_cpuid(&kvm)?;
            if let Some(record) = touched {
                memory::touched::populate(&memory, &record, || is_stopped.load(Ordering::Relaxed));
            }
            Ok(Loaded::State(Box::new(state), supported))
        })
    }

    fn start(load: impl FnOnce(&AtomicBool) -> Result<Loaded> + Send + 'static) -> Result<Loader> {
        let is_stopped = Arc::new(AtomicBool::new(false));
        let flag = is_stopped.clone();
        let thread = sandbox::spawn_confined(ThreadRole::Loader, "loader", move || load(&flag));
        Ok(Loader { thread: Some(thread.context("start the loader thread")?), is_stopped })
    }

    fn finish(mut self) -> Result<Loaded> {
        self.is_stopped.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the loader thread has ended")?;
        thread.join().map_err(|_| anyhow!("the loader thread panicked"))?
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The error of KVM's setup is reported instead.
            let _ = thread.join();
        }
    }
}

fn attach_console(vm: &Vm, buses: &mut Buses, exit_latch: &Arc<ExitLatch>, timings: &Arc<Timings>) -> Result<Console> {
    const REGISTERS: u64 = 8;
    let irq = IrqLine::new(layout::SERIAL_GSI)?;
    vm.connect_irq(&irq)?;
    let output = buses.console.clone();
    let (serial, input_wanted) = Serial::new(irq, output.clone(), exit_latch.clone(), timings.clone())?;
    let serial = Arc::new(serial);
    buses.ports.insert(u64::from(layout::SERIAL_PORT), REGISTERS, serial.clone())?;
    Ok(Console { serial, output, input_wanted })
}

fn start_vcpus(
    vm: &Vm,
    count: u32,
    buses: &Arc<Buses>,
    exit_latch: &Arc<ExitLatch>,
    prepare: &Prepare<'_>,
) -> Result<Vec<VcpuThread>> {
    vcpu::prepare_kicks().context("set up the signal that interrupts vCPUs")?;
    let start = |index| {
        let fd = vm.create_vcpu(index)?;
        prepare(&fd, index).with_context(|| format!("set up vCPU {index}"))?;
        VcpuThread::start(index, fd, buses.clone(), exit_latch.clone()).with_context(|| format!("start vCPU {index}"))
    };
    (0..count).map(start).collect()
}
