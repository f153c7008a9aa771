//! Cloud Hypervisor, with the serial port on standard output.

use anyhow::Result;

use super::super::report::{self, Isolation};
use super::guest::{self, GuestFiles, GuestOptions};
use super::network::Tap;
use super::program::{Program, major};
use super::{Contender, Fixture, Job, Launch, strings};

/// Cloud Hypervisor.
pub struct CloudHypervisor(Program);

const NAME: &str = "cloud-hypervisor";
/// There is no Debian package.
const INSTALL: &str = "not packaged in Debian: put the binary of a release on the path as `cloud-hypervisor`";

/// Since this version, a disk without an explicit image type has a write-protected first sector (release notes of
/// 51.0).
const IMAGE_TYPE_SINCE: u32 = 51;

impl CloudHypervisor {
    fn version(&self) -> &str {
        self.0.version.as_deref().unwrap_or_default()
    }

    /// Detects it, and a kernel to boot.
    pub fn find() -> CloudHypervisor {
        CloudHypervisor(guest::require_kernel(Program::find(NAME, &["--version"], INSTALL)))
    }
}

/// Builds the command line. The guest powers off, because Cloud Hypervisor reboots the machine on every kind of reset.
fn command_line(
    version: &str,
    fixture: &Fixture,
    files: &GuestFiles,
    tap: Option<&Tap>,
    job: &Job,
) -> Result<Vec<String>> {
    let GuestFiles { kernel, root, scratch } = files;
    let network = tap.map(Tap::network);
    let options =
        GuestOptions { end: "power-off", platform: "", scratch: scratch.is_some(), network: network.as_deref() };
    let mut line =
        strings(&[NAME, "--kernel", &kernel.display().to_string(), "--cmdline", &guest::cmdline(options, job)?]);
    line.extend(strings(&["--cpus", &format!("boot={}", fixture.vcpus())]));
    line.extend(strings(&["--memory", &format!("size={}M", fixture.limits.memory_mib)]));
    let kind = if major(version) >= IMAGE_TYPE_SINCE { ",image_type=raw" } else { "" };
    line.extend(strings(&["--disk", &format!("path={},readonly=on{kind}", root.display())]));
    line.extend(scratch.map(|scratch| format!("path={}{kind}", scratch.display())));
    if let Some(tap) = tap {
        line.extend(strings(&["--net", &format!("tap={}", tap.interface())]));
    }
    line.extend(strings(&["--serial", "tty", "--console", "off"]));
    Ok(line)
}

impl Contender for CloudHypervisor {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::Machine
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        guest::describe(&self.0, NAME, fixture, |files, job| command_line(self.version(), fixture, files, None, job))
    }

    fn exits_on_kernel_crash(&self) -> bool {
        false
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        guest::launch_with_tap(NAME, fixture, job, |files, tap, job| {
            command_line(self.version(), fixture, files, tap, job)
        })
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
    fn the_command_line_has_disks_limits_and_command() {
        let line = command_line("39.0.0", &fixture(), &files(), None, &job(&["/bin/x"])).unwrap();
        let cmdline = line.get(4).unwrap();
        assert!(cmdline.contains(" root=/dev/vda ") && cmdline.ends_with(" --scratch /bin/x"), "{cmdline}");
        let line = line.join(" ");
        assert!(line.starts_with("cloud-hypervisor --kernel /k/vmlinux --cmdline "), "{line}");
        let rest = " --cpus boot=2 --memory size=256M --disk path=/g/root.erofs,readonly=on path=/g/scratch --serial tty \
                    --console off";
        assert!(line.ends_with(rest), "{line}");
        let line =
            command_line("53.0-246-gae44c2971", &fixture(), &files(), None, &job(&["/bin/x"])).unwrap().join(" ");
        let disks = " --disk path=/g/root.erofs,readonly=on,image_type=raw path=/g/scratch,image_type=raw --serial";
        assert!(line.contains(disks), "{line}");
    }

    #[test]
    fn a_port_is_reached_by_a_tap_device() {
        let line = command_line("39.0.0", &fixture(), &files(), Some(&tap()), &job(&["/bin/x"])).unwrap();
        let cmdline = line.get(4).unwrap();
        assert!(cmdline.ends_with(" --net 198.18.0.14/30,198.18.0.13 /bin/x"), "{cmdline}");
        assert!(line.join(" ").ends_with(" --net tap=hb0a1b2c-3 --serial tty --console off"), "{line:?}");
    }
}
