//! QEMU's microvm machine.

use anyhow::Result;

use super::super::result::{self, Walls};
use super::guest::{self, Files, Parts};
use super::program::Program;
use super::{Contender, Ground, Job, Launch, port, words};

/// QEMU.
pub struct Qemu(Program);

const NAME: &str = "qemu-microvm";
const PROGRAM: &str = "qemu-system-x86_64";
/// As lean as its documentation has it (QEMU, system/i386/microvm.rst).
const MACHINE: &str = "microvm,x-option-roms=off,isa-serial=on,rtc=off,pit=off,pic=off,auto-kernel-cmdline=off";
/// A guest's address on QEMU's user-mode network, and its way out.
const ADDRESS: &str = "10.0.2.15";
const NETWORK: &str = "10.0.2.15/24,10.0.2.2";

impl Qemu {
    /// Looks for it, and for a kernel to boot.
    pub fn find() -> Qemu {
        let program = Program::find(PROGRAM, &["--version"], "sudo apt-get install qemu-system-x86");
        Qemu(guest::with_kernel(program))
    }
}

fn command_line(ground: &Ground, files: &Files, job: &Job) -> Result<Vec<String>> {
    let Files { kernel, root, scratch } = files;
    let parts = Parts {
        end: "reset",
        platform: "pci=off reboot=t",
        scratch: scratch.is_some(),
        network: job.port.map(|_| NETWORK),
    };
    let cmdline = guest::cmdline(parts, job)?;
    let mut line = words(&[PROGRAM, "-M", MACHINE, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host"]);
    line.extend(words(&["-m", &ground.limits.memory_mib.to_string(), "-smp", &ground.vcpus().to_string()]));
    line.extend(words(&["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]));
    line.extend(words(&["-device", "virtio-rng-device"]));
    let root = format!("id=root,if=none,format=raw,read-only=on,file={}", root.display());
    line.extend(words(&["-drive", &root, "-device", "virtio-blk-device,drive=root"]));
    if let Some(scratch) = scratch {
        let scratch = format!("id=scratch,if=none,format=raw,file={}", scratch.display());
        line.extend(words(&["-drive", &scratch, "-device", "virtio-blk-device,drive=scratch"]));
    }
    if let Some(port) = job.port {
        let forward = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-{ADDRESS}:{port}");
        line.extend(words(&["-netdev", &forward, "-device", "virtio-net-device,netdev=net"]));
    }
    line.extend(words(&["-kernel", &kernel.display().to_string(), "-append", &cmdline]));
    Ok(line)
}

impl Contender for Qemu {
    fn name(&self) -> &str {
        NAME
    }

    fn walls(&self) -> Walls {
        Walls::Machine
    }

    fn about(&self, ground: &Ground) -> result::Contender {
        guest::about(&self.0, NAME, ground, |files, job| command_line(ground, files, job))
    }

    fn prepare(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }

    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch> {
        let address = job.port.map(port::on_loopback);
        guest::launch(NAME, ground, job, address, |files, job| command_line(ground, files, job))
    }

    fn clean_up(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }
}
