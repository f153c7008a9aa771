//! `husk boot`: from flags and a configuration file to a machine, and from its end to an exit code.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::{PathBufValueParser, TypedValueParser};

use super::cpus::{self, Cpus};
use super::exit::{EXIT_CODES, Exit};
use super::life::{self, Called, Life};
use super::limits::Limits;
use super::network::{NetworkFlags, join_shared};
use super::size;
use crate::config::Rate;
use crate::config::{DEFAULT_CID, DiskConfig, Format, MachineConfig, VsockConfig};
use crate::console::terminal;
use crate::exit_latch::ExitReason;
use crate::machine::Machine;
use crate::resources;
use crate::supervisor::{self, Stdio};
use crate::timings::Timings;

/// How long who reads what went wrong may take, when somebody waits for the end.
const LAST_WORDS: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  A kernel and an initial RAM disk, on this terminal (Ctrl-A x ends it, Ctrl-A h helps):
    husk boot --kernel bzImage --initrd initrd.cpio

  A disk as the root file system, a second one read-only, two processors, two GiB:
    husk boot --kernel vmlinux --disk root.img --disk data.img,ro,id=data --cpus 2 --memory 2G

  Commands from a pipe:
    echo 'uname -a; poweroff' | husk boot --kernel vmlinux --initrd initrd.cpio

  The same machine again, from a file, with more memory:
    husk boot --kernel vmlinux --disk root.img --print-config > machine.json
    husk boot --config machine.json --memory 4G";

/// The flags of `husk boot`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub struct Boot {
    /// Guest kernel: an ELF vmlinux, a bzImage or a unified kernel image (UKI)
    ///
    /// Of a unified kernel image the kernel, the initial RAM disk and the words for the command line are used; --initrd
    /// stands in place of its RAM disk, and --cmdline behind its words, so that yours win.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Words for the kernel's command line, behind husk's own, so that they win
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Leave husk's own words out of the kernel's command line
    #[arg(long)]
    bare_cmdline: bool,

    /// Number of CPUs, 0.01 to 32 [default: 1]
    ///
    /// A number with a fraction holds the whole machine to so much of the host's processor time, by a control group: 1.5 is
    /// 2 vCPUs that get one and a half between them.
    #[arg(long, value_name = "N", value_parser = cpus::cpus)]
    cpus: Option<Cpus>,

    /// Guest memory: 512M, 1.5G, 2GiB; a plain number is bytes [default: 512M]
    ///
    /// Units are b, k, m, g and t as in Docker, in steps of 1024. A part of a MiB counts as a whole one.
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, allow_negative_numbers = true)]
    memory: Option<u64>,

    #[command(flatten)]
    limits: Limits,

    /// Let the guest run virtual machines of its own, where the host's KVM can do that
    #[arg(long)]
    nested: bool,

    /// Disk image or block device; may be given several times, the first is /dev/vda
    ///
    /// `ro` lets the guest only read, `id=NAME` is the serial number it reads (/dev/disk/by-id/virtio-NAME). The format is
    /// raw, or qcow2 where the name ends in .qcow2; `format=` says otherwise. `block_size=4096` is for what was written in blocks
    /// of 4096 bytes; without it a block device has its own and a file has 512. `bps=10M` and `iops=500` limit the bytes and the
    /// requests of a second, reads and writes together; after a pause a tenth of a second's may pass at once, or as much as
    /// `bps-burst=` and `iops-burst=` say. The first comma ends the path: a path with a comma in it goes into a configuration
    /// file.
    #[arg(long = "disk", value_name = "PATH[,OPTION...]", value_parser = PathBufValueParser::new().try_map(disk))]
    disks: Vec<DiskConfig>,

    /// Sockets between guest and host: connections to the guest are made at the Unix socket PATH
    ///
    /// A program connects to PATH, writes `CONNECT <port>` and a newline, and reads `OK <port>` and a newline once the guest
    /// has accepted. The guest's connections to port P of the host (CID 2) arrive at the Unix socket PATH_P. `cid=N` is the
    /// guest's own address, 3 unless given.
    #[arg(long, value_name = "PATH[,cid=N]", value_parser = PathBufValueParser::new().try_map(vsock))]
    vsock: Option<VsockConfig>,

    #[command(flatten)]
    life: Life,

    #[command(flatten)]
    network: NetworkFlags,

    /// Say on standard error when each step of the boot was reached
    #[arg(long)]
    pub timings: bool,

    /// Take the machine from a JSON file, as --print-config writes it; flags win over the file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the machine as JSON and boot nothing
    #[arg(long)]
    print_config: bool,
}

impl Boot {
    /// Boots the machine and stays until it has ended.
    ///
    /// `started` is when the process began, as near as it knows.
    pub fn run(mut self, started: Instant) -> Result<Exit> {
        let mut config = self.machine_config()?;
        config.validate()?;
        if self.print_config {
            super::print_json(&config, "the configuration")?;
            return Ok(Exit::Success);
        }
        if self.life.hands_on() {
            return life::hand_on();
        }
        resources::host::warn_of_pvm();
        let timings = Arc::new(Timings::new(started));
        let called = Called {
            image: config.kernel.display().to_string(),
            command: Vec::new(),
            process: None,
            stop_signal: libc::SIGTERM as u8,
        };
        let folder = self.life.folder()?;
        let name = self.life.name.clone().unwrap_or_else(|| folder.id());
        let _leases = join_shared(&mut config.networks, &name)?;
        let endpoint = self.life.endpoint(folder, called, &config)?;
        let exit = self.life.lead(endpoint, false, |endpoint, signals| {
            let resources = resources::open(&config)?;
            let machine = Machine::build(&config, resources, timings.clone())?;
            Ok(report(&supervisor::run(machine, signals, Stdio::Console, endpoint)?))
        })?;
        if self.timings {
            super::say(&timings.to_string());
        }
        Ok(exit)
    }

    /// The file's machine, or the default one, changed by the flags. A list of disks, or of networks, replaces the file's.
    fn machine_config(&self) -> Result<MachineConfig> {
        let mut config = match &self.config {
            Some(path) => MachineConfig::from_json(&resources::text::read(path)?)
                .with_context(|| format!("read {}", path.display()))?,
            None => MachineConfig::default(),
        };
        if let Some(kernel) = &self.kernel {
            config.kernel.clone_from(kernel);
        }
        if self.initrd.is_some() {
            config.initrd.clone_from(&self.initrd);
        }
        if let Some(cmdline) = &self.cmdline {
            config.cmdline.clone_from(cmdline);
        }
        config.default_cmdline &= !self.bare_cmdline;
        if let Some(Cpus { vcpus, limit_millicpus }) = self.cpus {
            (config.cpus, config.cpu_limit_millicpus) = (vcpus, limit_millicpus);
        }
        config.nested |= self.nested;
        if !self.disks.is_empty() {
            config.disks.clone_from(&self.disks);
        }
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        if !self.network.is_empty() {
            config.networks = self.network.configs()?;
        }
        self.network.limit(config.networks.iter_mut().map(|network| &mut network.rate))?;
        self.limits.apply(self.memory, &mut config);
        Ok(config)
    }
}

/// Says what ended the machine, unless it ended as it was meant to.
pub fn report(reason: &ExitReason) -> Exit {
    let exit = Exit::from(reason);
    match exit {
        Exit::Success | Exit::Reported(_) => {}
        // Whoever ended it need not wait for a reader that sleeps.
        Exit::Signal(_) => drop(terminal::say(&format!("husk: {reason}\n"), LAST_WORDS)),
        _ => super::print_error(&reason.to_string()),
    }
    exit
}

/// Parses `PATH[,OPTION]...`; the path may be any bytes but a comma.
fn disk(argument: PathBuf) -> Result<DiskConfig, String> {
    let mut parts = argument.as_os_str().as_bytes().split(|&byte| byte == b',');
    let path = parts.next().unwrap_or_default().to_vec();
    let path = std::ffi::OsString::from_vec(path).into();
    let mut disk =
        DiskConfig { path, readonly: false, id: None, format: None, block_bytes: None, rate: Rate::default() };
    for option in parts {
        let option = String::from_utf8_lossy(option);
        let unknown = || {
            format!(
                "unknown option {option:?}, type ro, id=NAME, format=raw, format=qcow2, block_size=N, bps=SIZE, bps-burst=SIZE, iops=N or \
                 iops-burst=N"
            )
        };
        match option.split_once('=').unwrap_or((&option, "")) {
            ("ro", "") => disk.readonly = true,
            ("format", "raw") => disk.format = Some(Format::Raw),
            ("format", "qcow2") => disk.format = Some(Format::Qcow2),
            ("id", id) => disk.id = Some(id.to_owned()),
            ("block_size", text) => disk.block_bytes = Some(text.parse().map_err(|_| unknown())?),
            ("bps", text) => disk.rate.bytes_per_second = Some(size::bytes(text)?),
            ("bps-burst", text) => disk.rate.burst_bytes = Some(size::bytes(text)?),
            ("iops", text) => disk.rate.ops_per_second = Some(text.parse().map_err(|_| unknown())?),
            ("iops-burst", text) => disk.rate.burst_ops = Some(text.parse().map_err(|_| unknown())?),
            _ => return Err(unknown()),
        }
    }
    Ok(disk)
}

/// Parses `PATH[,cid=N]`; the path may be any bytes but a comma.
fn vsock(argument: PathBuf) -> Result<VsockConfig, String> {
    let mut parts = argument.as_os_str().as_bytes().split(|&byte| byte == b',');
    let socket = std::ffi::OsString::from_vec(parts.next().unwrap_or_default().to_vec()).into();
    let mut vsock = VsockConfig { socket, cid: DEFAULT_CID };
    for option in parts {
        let option = String::from_utf8_lossy(option);
        let cid = option.strip_prefix("cid=").and_then(|cid| cid.parse().ok());
        vsock.cid = cid.ok_or_else(|| format!("unknown option {option:?}, type cid=N"))?;
    }
    Ok(vsock)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        boot: Boot,
    }

    fn parse(words: &[&str]) -> Boot {
        Cli::try_parse_from([&["boot"], words].concat()).map(|cli| cli.boot).unwrap()
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let json = r#"{"kernel": "a", "cmdline": "quiet", "cpus": 2, "cpu_limit_millicpus": 1500, "memory_mib": 64, "disks": [{"path": "a.img"}]}"#;
        std::fs::write(&file, json).unwrap();
        let path = file.path().to_str().unwrap();

        let unchanged = parse(&["--config", path]).machine_config().unwrap();
        assert_eq!(unchanged, MachineConfig::from_json(json).unwrap());

        let flags =
            ["--config", path, "--kernel=b", "--memory=1G", "--bare-cmdline", "--disk=b.img", "--disk=c.img,ro"];
        let changed = parse(&flags).machine_config().unwrap();
        assert_eq!((changed.kernel, changed.memory_mib, changed.default_cmdline), ("b".into(), 1024, false));
        assert_eq!((changed.cmdline.as_str(), changed.cpus, changed.cpu_limit_millicpus), ("quiet", 2, Some(1500)));
        let whole = parse(&["--config", path, "--cpus=2"]).machine_config().unwrap();
        assert_eq!((whole.cpus, whole.cpu_limit_millicpus), (2, None));
        assert_eq!(
            changed.disks.iter().map(|disk| disk.path.to_str()).collect::<Vec<_>>(),
            [Some("b.img"), Some("c.img")]
        );
    }

    #[test]
    fn a_disk_is_a_path_and_options() {
        let id = |text: &str| Some(text.to_owned());
        let path = PathBuf::from("/x y.img");
        let plain =
            DiskConfig { path, readonly: false, id: None, format: None, block_bytes: None, rate: Rate::default() };
        assert_eq!(disk("/x y.img".into()), Ok(plain.clone()));
        assert_eq!(disk("/x y.img,id=a,ro".into()), Ok(DiskConfig { readonly: true, id: id("a"), ..plain.clone() }));
        for (text, format) in [("raw", Format::Raw), ("qcow2", Format::Qcow2)] {
            let wanted = DiskConfig { format: Some(format), ..plain.clone() };
            assert_eq!(disk(format!("/x y.img,format={text}").into()), Ok(wanted));
        }
        let rate = Rate { bytes_per_second: Some(10 << 20), burst_bytes: Some(1024), ..Rate::default() };
        assert_eq!(disk("/x y.img,bps=10M,bps-burst=1k".into()), Ok(DiskConfig { rate, ..plain.clone() }));
        let rate = Rate { ops_per_second: Some(500), burst_ops: Some(50), ..Rate::default() };
        assert_eq!(disk("/x y.img,iops=500,iops-burst=50".into()), Ok(DiskConfig { rate, ..plain.clone() }));
        let wanted = DiskConfig { block_bytes: Some(4096), ..plain.clone() };
        assert_eq!(disk("/x y.img,block_size=4096".into()), Ok(wanted));
        for wrong in [
            "format=vmdk",
            "block_size=",
            "block_size=4k",
            "iops=",
            "iops=1.5",
            "iops=-1",
            "iops-burst=x",
            "ro=yes",
            "bandwidth=1",
        ] {
            assert!(disk(format!("x.img,{wrong}").into()).unwrap_err().contains("format=raw, format=qcow2"), "{wrong}");
        }
        assert!(disk("x.img,bps=fast".into()).unwrap_err().contains("not a size"));
        assert!(disk("x.img,or".into()).unwrap_err().contains("\"or\""));
        assert!(disk("x.img,".into()).is_err());
    }
    #[test]
    fn sockets_are_a_path_and_an_address() {
        let socket = PathBuf::from("/run/v.sock");
        assert_eq!(vsock("/run/v.sock".into()), Ok(VsockConfig { socket: socket.clone(), cid: 3 }));
        assert_eq!(vsock("/run/v.sock,cid=52".into()), Ok(VsockConfig { socket, cid: 52 }));
        for wrong in ["v.sock,", "v.sock,cid=", "v.sock,cid=-1", "v.sock,ro"] {
            assert!(vsock(wrong.into()).unwrap_err().contains("type cid=N"), "{wrong}");
        }
        let config = parse(&["--kernel=b", "--vsock=v.sock,cid=9"]).machine_config().unwrap();
        assert_eq!(config.vsock, Some(VsockConfig { socket: "v.sock".into(), cid: 9 }));
    }
}
