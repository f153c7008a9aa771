//! PID 1 of a machine without another init: sets up what a container's runtime provides.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use husk_init::errors::{CODE_NOT_EXECUTABLE, CODE_NOT_FOUND, Context, Failure};
use husk_init::network::Network;
use husk_init::root::{mount_at, mount_device};
use husk_protocol::{Interface, InterfaceAddress, Route};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use crate::command::{End, Guest, Net};
use crate::say;

const SCRATCH: &str = "/scratch";
/// The machine's second disk.
const SCRATCH_DEVICE: &str = "/dev/vdb";
const INTERFACE: &str = "/sys/class/net/eth0";
/// How long a driver may take to probe its device, in milliseconds.
const DEVICE_TIMEOUT_MS: u32 = 5000;
/// Documentation/admin-guide/devices.txt: /dev/null.
const NULL_DEVICE: u64 = libc::makedev(1, 3);

/// Runs the machine until its end. Returns only if this is not the first process of a machine.
pub fn run(guest: &Guest) -> u8 {
    if std::process::id() != 1 {
        eprintln!("husk-workload: guest is only for the first process of a machine: type the command without it");
        return 2;
    }
    let code = set_up(guest).and_then(|()| run_child(&guest.command)).unwrap_or_else(|failure| {
        say::line(format_args!("fail guest {}", failure.message));
        failure.code
    });
    // Regardless of whether it was mounted: data must be on the disk.
    let _ = umount2(SCRATCH, MntFlags::MNT_DETACH);
    nix::unistd::sync();
    say::line(format_args!("exit {code}"));
    let mode = match guest.end {
        End::PowerOff => RebootMode::RB_POWER_OFF,
        End::Reset => RebootMode::RB_AUTOBOOT,
    };
    loop {
        let _ = reboot(mode);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn set_up(guest: &Guest) -> Result<(), Failure> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    for (kind, dir, flags, options) in [
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
        ("proc", "/proc", quiet | MsFlags::MS_NOEXEC, ""),
        ("sysfs", "/sys", quiet | MsFlags::MS_NOEXEC, ""),
        ("tmpfs", "/tmp", quiet, "mode=1777"),
        ("tmpfs", "/run", quiet, "mode=755"),
    ] {
        match mount_at(kind, dir, flags, options) {
            // Already mounted by the kernel.
            Err(_) if kind == "devtmpfs" && Path::new("/dev/null").exists() => {}
            other => other?,
        }
    }
    open_console();
    // Kernel messages would interleave with our output. A panic is printed anyway.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    if guest.scratch {
        await_path(SCRATCH_DEVICE)?;
        mount_device(SCRATCH_DEVICE, SCRATCH, "ext4", MsFlags::empty(), "")
            .context(format_args!("mount {SCRATCH_DEVICE} on {SCRATCH} (ext4)"))?;
    }
    set_up_network(guest.net.as_ref())
}

/// A kernel whose initial root file system has no console gives none to its first process, for which Rust's library
/// then opens /dev/null.
fn open_console() {
    if fs::metadata("/dev/stdout")
        .or_else(|_| fs::metadata("/proc/self/fd/1"))
        .is_ok_and(|file| file.rdev() != NULL_DEVICE)
    {
        return;
    }
    if let Ok(console) = fs::OpenOptions::new().read(true).write(true).open("/dev/console") {
        let _ =
            (nix::unistd::dup2_stdin(&console), nix::unistd::dup2_stdout(&console), nix::unistd::dup2_stderr(&console));
    }
}

fn set_up_network(net: Option<&Net>) -> Result<(), Failure> {
    let network = Network::open().and_then(|network| network.bring_loopback_up().map(|()| network));
    match (network, net) {
        (Ok(network), Some(net)) => network.set_up(&interface(net)?),
        // Without networking requested, a kernel without support is no error.
        (_, None) => Ok(()),
        (Err(failure), Some(_)) => Err(failure),
    }
}

fn interface(net: &Net) -> Result<Interface, Failure> {
    await_path(INTERFACE)?;
    let text = fs::read_to_string(Path::new(INTERFACE).join("address")).context("look at eth0")?;
    let mac = parse_mac(text.trim()).ok_or_else(|| Failure::new("eth0 has no Ethernet address"))?;
    let addresses = vec![InterfaceAddress { ip: net.ip, prefix: net.prefix }];
    let routes = vec![Route::through(net.gateway)];
    Ok(Interface { device_mac: mac, mac, mtu_bytes: None, addresses, routes })
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

fn await_path(path: &str) -> Result<(), Failure> {
    for _ in 0..DEVICE_TIMEOUT_MS {
        if Path::new(path).exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Failure::new(format_args!("there is no {path}: does the kernel have a driver for it?")))
}

/// Runs the command, reaps all children meanwhile, and returns the command's exit code.
fn run_child(command: &[String]) -> Result<u8, Failure> {
    let (program, args) = command.split_first().ok_or_else(|| Failure::new("there is no command"))?;
    let child = Command::new(program).args(args).spawn().map_err(|error| Failure {
        message: format!("start {program}: {error}"),
        code: if error.kind() == std::io::ErrorKind::NotFound { CODE_NOT_FOUND } else { CODE_NOT_EXECUTABLE },
    })?;
    let child = Pid::from_raw(child.id() as i32);
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(code as u8),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return Ok(128 + signal as i32 as u8),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("wait for the command"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ethernet_address_has_six_bytes() {
        assert_eq!(parse_mac("02:00:0a:ff:1b:9c"), Some([2, 0, 10, 255, 27, 156]));
        for wrong in ["", "02:00:0a:ff:1b", "02:00:0a:ff:1b:9c:00", "02:00:0a:ff:1b:xx"] {
            assert_eq!(parse_mac(wrong), None);
        }
    }
}
