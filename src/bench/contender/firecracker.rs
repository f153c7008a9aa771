//! Firecracker, with a configuration file instead of its API, and the serial port on standard output.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::report::{self, Isolation};
use super::guest::{self, GuestFiles, GuestOptions};
use super::network::Tap;
use super::program::Program;
use super::{Contender, Fixture, Job, Launch, strings, work_dir};

/// Firecracker.
pub struct Firecracker(Program);

const NAME: &str = "firecracker";
/// There is no Debian package.
const INSTALL: &str = "not packaged in Debian: put the binary of a release on the path as `firecracker`";

impl Firecracker {
    /// Detects it, and a kernel to boot.
    pub fn find() -> Firecracker {
        Firecracker(guest::require_kernel(Program::find(NAME, &["--version"], INSTALL)))
    }
}

/// Builds the configuration file (Firecracker, docs/getting-started.md). Firecracker exits when the guest resets
/// through the keyboard controller.
fn config(fixture: &Fixture, files: &GuestFiles, tap: Option<&Tap>, job: &Job) -> Result<Value> {
    let GuestFiles { kernel, root, scratch } = files;
    let network = tap.map(Tap::network);
    let options = GuestOptions {
        end: "reset",
        platform: "pci=off reboot=k",
        scratch: scratch.is_some(),
        network: network.as_deref(),
    };
    let mut drives = vec![drive("root", root, true)];
    drives.extend(scratch.map(|scratch| drive("scratch", scratch, false)));
    let mut config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": guest::cmdline(options, job)? },
        "drives": drives,
        "machine-config": { "vcpu_count": fixture.vcpus(), "mem_size_mib": fixture.limits.memory_mib, "smt": false },
    });
    if let Some(tap) = tap {
        config["network-interfaces"] = json!([{ "iface_id": "net", "host_dev_name": tap.interface() }]);
    }
    Ok(config)
}

/// The kernel command line names the root device, because Firecracker would append its own. Without `Writeback`, the
/// device ignores flushes and a guest's fdatasync would do nothing (docs/api_requests/block-caching.md).
fn drive(id: &str, path: &Path, is_read_only: bool) -> Value {
    json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only,
        "cache_type": "Writeback",
    })
}

fn command_line(config: &str) -> Vec<String> {
    strings(&[NAME, "--no-api", "--config-file", config])
}

impl Contender for Firecracker {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::Machine
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        guest::describe(&self.0, NAME, fixture, |_, _| Ok(command_line("CONFIG")))
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let dir = fixture.instance_dir(NAME, job)?;
        let path = dir.join("config.json");
        let launch = guest::launch_with_tap(NAME, fixture, job, |files, tap, job| {
            let config = serde_json::to_vec(&config(fixture, files, tap, job)?)?;
            fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
            Ok(command_line(&path.display().to_string()))
        })?;
        Ok(launch.then_clean_up(move || work_dir::remove(&dir)))
    }

    fn clean_up(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{files, fixture, job, tap};
    use super::*;

    #[test]
    fn the_configuration_has_disks_limits_and_command() {
        let config = config(&fixture(), &files(), None, &job(&["/bin/x"])).unwrap();
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
    fn durable_writes_of_a_guest_reach_the_disk() {
        assert_eq!(drive("scratch", Path::new("/g/scratch"), false)["cache_type"], "Writeback");
    }

    #[test]
    fn a_port_is_reached_by_a_tap_device() {
        let config = config(&fixture(), &files(), Some(&tap()), &job(&["/bin/x"])).unwrap();
        assert_eq!(config["network-interfaces"], json!([{ "iface_id": "net", "host_dev_name": "hb0a1b2c-3" }]));
        let cmdline = config["boot-source"]["boot_args"].as_str().unwrap();
        assert!(cmdline.ends_with(" --net 198.18.0.14/30,198.18.0.13 /bin/x"), "{cmdline}");
    }
}
