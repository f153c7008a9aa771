//! Firecracker, without its API: a configuration file, and the serial port on standard output.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::result::{self, Walls};
use super::guest::{self, Files, Parts};
use super::port::Tap;
use super::program::Program;
use super::{Contender, Ground, Job, Launch, ground, words};

/// Firecracker.
pub struct Firecracker(Program);

const NAME: &str = "firecracker";
/// It has no package in Debian.
const INSTALL: &str = "it is in no package of Debian's: put the binary of a release on the path as `firecracker`";

impl Firecracker {
    /// Looks for it, and for a kernel to boot.
    pub fn find() -> Firecracker {
        Firecracker(guest::with_kernel(Program::find(NAME, &["--version"], INSTALL)))
    }
}

/// The configuration, as its API has it (Firecracker, docs/getting-started.md). It ends when the guest resets by the keyboard's
/// controller.
fn config(ground: &Ground, files: &Files, tap: Option<&Tap>, job: &Job) -> Result<Value> {
    let Files { kernel, root, scratch } = files;
    let network = tap.map(Tap::network);
    let parts =
        Parts { end: "reset", platform: "pci=off reboot=k", scratch: scratch.is_some(), network: network.as_deref() };
    let mut drives = vec![drive("root", root, true)];
    drives.extend(scratch.map(|scratch| drive("scratch", scratch, false)));
    let mut config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": guest::cmdline(parts, job)? },
        "drives": drives,
        "machine-config": { "vcpu_count": ground.vcpus(), "mem_size_mib": ground.limits.memory_mib, "smt": false },
    });
    if let Some(tap) = tap {
        config["network-interfaces"] = json!([{ "iface_id": "net", "host_dev_name": tap.interface() }]);
    }
    Ok(config)
}

/// The root's place on the command line is ours: it would put its own behind. Unless told so, a disk of its takes no flushes, and a
/// guest's fdatasync would do nothing (docs/api_requests/block-caching.md).
fn drive(id: &str, path: &Path, is_read_only: bool) -> Value {
    json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only,
        "cache_type": "Writeback",
    })
}

fn command_line(config: &str) -> Vec<String> {
    words(&[NAME, "--no-api", "--config-file", config])
}

impl Contender for Firecracker {
    fn name(&self) -> &str {
        NAME
    }

    fn walls(&self) -> Walls {
        Walls::Machine
    }

    fn about(&self, ground: &Ground) -> result::Contender {
        guest::about(&self.0, NAME, ground, |_, _| Ok(command_line("CONFIG")))
    }

    fn prepare(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }

    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch> {
        let folder = ground.instance_folder(NAME, job)?;
        let path = folder.join("config.json");
        let launch = guest::launch_with_tap(NAME, ground, job, |files, tap, job| {
            let config = serde_json::to_vec(&config(ground, files, tap, job)?)?;
            fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
            Ok(command_line(&path.display().to_string()))
        })?;
        Ok(launch.then_clean_up(move || ground::clear(&folder)))
    }

    fn clean_up(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{files, ground, job, tap};
    use super::*;

    #[test]
    fn the_configuration_has_disks_limits_and_command() {
        let config = config(&ground(), &files(), None, &job(&["/bin/x"])).unwrap();
        assert_eq!(config["boot-source"]["kernel_image_path"], "/k/vmlinux");
        let cmdline = config["boot-source"]["boot_args"].as_str().unwrap();
        assert!(cmdline.contains(" reboot=k ") && cmdline.ends_with(" --scratch /bin/x"), "{cmdline}");
        assert_eq!(config["machine-config"], json!({ "vcpu_count": 2, "mem_size_mib": 256, "smt": false }));
        let drives =
            [drive("root", Path::new("/g/root.erofs"), true), drive("scratch", Path::new("/g/scratch"), false)];
        assert_eq!(config["drives"], json!(drives));
        assert_eq!(config.get("network-interfaces"), None);
    }

    #[test]
    fn what_a_guest_has_written_durably_is_on_the_disk() {
        assert_eq!(drive("scratch", Path::new("/g/scratch"), false)["cache_type"], "Writeback");
    }

    #[test]
    fn a_port_is_reached_by_a_tap_device() {
        let config = config(&ground(), &files(), Some(&tap()), &job(&["/bin/x"])).unwrap();
        assert_eq!(config["network-interfaces"], json!([{ "iface_id": "net", "host_dev_name": "hb0a1b2c-3" }]));
        let cmdline = config["boot-source"]["boot_args"].as_str().unwrap();
        assert!(cmdline.ends_with(" --net 198.18.0.14/30,198.18.0.13 /bin/x"), "{cmdline}");
    }
}
