//! QEMU's microvm machine type.

use anyhow::Result;

use super::super::report::{self, Isolation};
use super::guest::{self, GuestFiles, GuestOptions};
use super::program::Program;
use super::{Contender, Fixture, Job, Launch, network, strings};

/// QEMU.
pub struct Qemu(Program);

const NAME: &str = "qemu-microvm";
const PROGRAM: &str = "qemu-system-x86_64";
/// The minimal configuration from its documentation (QEMU, system/i386/microvm.rst).
const MACHINE: &str = "microvm,x-option-roms=off,isa-serial=on,rtc=off,pit=off,pic=off,auto-kernel-cmdline=off";
/// The guest's address and gateway on QEMU's user-mode network.
const ADDRESS: &str = "10.0.2.15";
const NETWORK: &str = "10.0.2.15/24,10.0.2.2";

impl Qemu {
    /// Detects it, and a kernel to boot.
    pub fn find() -> Qemu {
        let program = Program::find(PROGRAM, &["--version"], "sudo apt-get install qemu-system-x86");
        Qemu(guest::require_kernel(program))
    }
}

fn command_line(fixture: &Fixture, files: &GuestFiles, job: &Job) -> Result<Vec<String>> {
    let GuestFiles { kernel, root, scratch } = files;
    let options = GuestOptions {
        end: "reset",
        platform: "pci=off reboot=t",
        scratch: scratch.is_some(),
        network: job.port.map(|_| NETWORK),
    };
    let cmdline = guest::cmdline(options, job)?;
    let mut line = strings(&[PROGRAM, "-M", MACHINE, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host"]);
    line.extend(strings(&["-m", &fixture.limits.memory_mib.to_string(), "-smp", &fixture.vcpus().to_string()]));
    line.extend(strings(&["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]));
    line.extend(strings(&["-device", "virtio-rng-device"]));
    let root = format!("id=root,if=none,format=raw,read-only=on,file={}", root.display());
    line.extend(strings(&["-drive", &root, "-device", "virtio-blk-device,drive=root"]));
    if let Some(scratch) = scratch {
        let scratch = format!("id=scratch,if=none,format=raw,file={}", scratch.display());
        line.extend(strings(&["-drive", &scratch, "-device", "virtio-blk-device,drive=scratch"]));
    }
    if let Some(port) = job.port {
        let forward = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-{ADDRESS}:{port}");
        line.extend(strings(&["-netdev", &forward, "-device", "virtio-net-device,netdev=net"]));
    }
    line.extend(strings(&["-kernel", &kernel.display().to_string(), "-append", &cmdline]));
    Ok(line)
}

impl Contender for Qemu {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::Machine
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        guest::describe(&self.0, NAME, fixture, |files, job| command_line(fixture, files, job))
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let address = job.port.map(network::loopback);
        guest::launch(NAME, fixture, job, address, |files, job| command_line(fixture, files, job))
    }

    fn clean_up(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }
}
