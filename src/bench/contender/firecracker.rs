//! Firecracker, without its API: a configuration file, and the serial port on standard output.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::result::{self, Walls};
use super::guest::{self, Files, Parts};
use super::program::Program;
use super::{Contender, Ground, Job, Launch, Unable, ground, words};

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

/// The configuration, as its API has it (Firecracker, docs/getting-started.md). It resets by the keyboard's controller.
fn config(ground: &Ground, files: &Files, job: &Job) -> Result<Value> {
    let Files { kernel, root, scratch } = files;
    let parts = Parts {
        end: "reset",
        platform: "pci=off reboot=k i8042.noaux i8042.nomux i8042.dumbkbd",
        scratch: scratch.is_some(),
        network: None,
    };
    // The root's place on the command line is ours: it would put its own behind.
    let drive = |id: &str, path: &std::path::Path, is_read_only: bool| json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only });
    let mut drives = vec![drive("root", root, true)];
    drives.extend(scratch.map(|scratch| drive("scratch", scratch, false)));
    Ok(json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": guest::cmdline(parts, job)? },
        "drives": drives,
        "machine-config": { "vcpu_count": ground.vcpus(), "mem_size_mib": ground.limits.memory_mib, "smt": false },
    }))
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
        if job.port.is_some() {
            return Err(Unable("its only network is a tap device".into()).into());
        }
        let folder = ground.instance_folder(NAME, job)?;
        let path = folder.join("config.json");
        let mut launch = guest::launch(NAME, ground, job, None, |files, job| {
            let config = serde_json::to_vec(&config(ground, files, job)?)?;
            fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
            Ok(command_line(&path.display().to_string()))
        })?;
        let inner = launch.clean_up.take();
        launch.clean_up = Some(Box::new(move || {
            inner.map_or(Ok(()), |clean_up| clean_up())?;
            ground::clear(&folder)
        }));
        Ok(launch)
    }

    fn clean_up(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{files, ground, job};
    use super::*;

    #[test]
    fn the_configuration_has_disks_limits_and_command() {
        let config = config(&ground(), &files(), &job(&["/bin/x"])).unwrap();
        assert_eq!(config["boot-source"]["kernel_image_path"], "/k/vmlinux");
        let cmdline = config["boot-source"]["boot_args"].as_str().unwrap();
        assert!(cmdline.contains(" reboot=k ") && cmdline.ends_with(" --scratch /bin/x"), "{cmdline}");
        assert_eq!(config["machine-config"], json!({ "vcpu_count": 2, "mem_size_mib": 256, "smt": false }));
        let drive = |id: &str, path: &str, is_read_only: bool| json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only });
        assert_eq!(
            config["drives"],
            json!([drive("root", "/g/root.erofs", true), drive("scratch", "/g/scratch", false)])
        );
    }
}
