//! `husk boot`: runs a machine configured by flags and a configuration file.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::{PathBufValueParser, TypedValueParser};

use super::cpus::{self, Cpus};
use super::exit::{EXIT_CODES, Exit};
use super::lifecycle::{self, LifecycleArgs, RecordInfo};
use super::limits::LimitFlags;
use super::network::{NetworkFlags, join_shared};
use super::size;
use crate::config::{
    Aio, BackingConfig, Cache, DEFAULT_CID, DiskConfig, Format, MachineConfig, ShareConfig, Transport, VsockConfig,
};
use crate::console::terminal;
use crate::exit_latch::ExitReason;
use crate::resources;
use crate::supervisor::{self, Stdio};
use crate::timings::Timings;

/// How long the reader of the error message may take, when another process waits for the exit.
const REPORT_TIMEOUT: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  Boot a kernel and an initrd on this terminal (Ctrl-A x quits, Ctrl-A h shows help):
    husk boot --kernel bzImage --initrd initrd.cpio

  Boot from a disk, with a second read-only disk, 2 CPUs and 2 GiB of memory:
    husk boot --kernel vmlinux --disk root.img --disk data.img,ro,id=data --cpus 2 --memory 2G

  Run commands from a pipe:
    echo 'uname -a; poweroff' | husk boot --kernel vmlinux --initrd initrd.cpio

  Save the configuration to a file, and boot from it with more memory:
    husk boot --kernel vmlinux --disk root.img --print-config > machine.json
    husk boot --config machine.json --memory 4G

SIGTERM, SIGINT, SIGHUP and SIGQUIT press the machine's power button; a second one terminates it.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct Boot {
    /// Guest kernel: an ELF vmlinux, a bzImage or a unified kernel image (UKI)
    ///
    /// A UKI provides the kernel, the initrd and the kernel command line; --initrd replaces its initrd, and --cmdline
    /// is appended to its command line, so that your parameters take precedence.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk (initrd, initramfs)
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Kernel command line, appended to husk's own parameters so that it takes precedence
    #[arg(long, value_name = "PARAMETERS", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Do not add husk's own parameters to the kernel command line
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    bare_cmdline: Option<bool>,

    /// Number of CPUs, 0.01 to 32 [default: 1]
    ///
    /// A fraction limits the host CPU time of the whole machine with a cgroup: 1.5 is 2 vCPUs that share the time of
    /// one and a half host CPUs.
    #[arg(long, value_name = "N", value_parser = cpus::cpus)]
    cpus: Option<Cpus>,

    /// Guest memory size: 512M, 1.5G, 2GiB; a plain number is bytes [default: 512M]
    ///
    /// Units are b, k, m, g and t as in Docker, in powers of 1024. The size is rounded up to a whole MiB.
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, allow_negative_numbers = true)]
    memory: Option<u64>,

    #[command(flatten)]
    limits: LimitFlags,

    /// How the guest finds its virtio devices: mmio boots fastest, pci has the faster interrupts; auto is mmio, unless
    /// the guest needs pci
    #[arg(long, value_name = "auto|mmio|pci")]
    transport: Option<Transport>,

    /// Enable nested virtualization, if the host's KVM supports it
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    nested: Option<bool>,

    /// Disk image or block device; can be repeated, the first one is /dev/vda
    ///
    /// `ro` makes the disk read-only. `id=NAME` sets its serial number (/dev/disk/by-id/virtio-NAME in the guest). The
    /// format is qcow2 if the name ends in .qcow2, and raw otherwise; `format=` overrides this. `block_size=` sets the
    /// logical block size; the default is that of the block device, or 512 for a file. `cache=none` bypasses the host's
    /// page cache (O_DIRECT), for a disk that is cached by its guests or shared with other hosts; the default is
    /// `cache=writeback`. `num_queues=N` gives the disk N queues, each with a thread of its own, for guests with
    /// several CPUs. `aio=threads` accesses the file with blocking system calls, and `aio=io_uring` only with io_uring;
    /// by default, io_uring is used for what it makes faster, if the host allows it. `backing=PATH` is the backing file
    /// of a qcow2 image, a second one that of the first, and so on; it is opened read-only, and `backing_format=` after
    /// it overrides its format. Backing files that only an image itself names are never opened. `bps=10M` and
    /// `iops=500` limit the bytes and the requests per second, reads and writes together; after an idle period, the
    /// disk can burst to a tenth of a second's worth at once, or to `bps-burst=` and `iops-burst=`. The path ends at
    /// the first comma: use a configuration file for a path that contains one.
    #[arg(long = "disk", value_name = "PATH[,OPTION...]", value_parser = PathBufValueParser::new().try_map(disk))]
    disks: Vec<DiskConfig>,

    /// Add a vsock device, which the host connects to at the Unix socket PATH
    ///
    /// To connect to the guest, connect to PATH, write `CONNECT <port>` and a newline, and read `OK <port>` and a
    /// newline once the guest has accepted (the same protocol as Firecracker's). Connections from the guest to port P
    /// of the host (CID 2) are forwarded to the Unix socket PATH_P. `cid=N` sets the guest's CID; the default is 3.
    #[arg(long, value_name = "PATH[,cid=N]", value_parser = PathBufValueParser::new().try_map(vsock))]
    vsock: Option<VsockConfig>,

    /// Share a folder or a file of the host, which the guest mounts: `mount -t virtiofs TAG DIR`; can be repeated
    ///
    /// `ro` lets the guest change nothing. `cache=auto`, the default, has the guest see changes by the host after a
    /// second; `cache=always` is faster, for a folder that only the guest changes; `cache=never` sees each at once. With
    /// `cache=writeback`, what the guest writes reaches the host later, at the latest when the file is closed. The
    /// path ends at the last colon. A file is in a folder of its own, named `file`.
    #[arg(long = "share", value_name = "PATH:TAG[,ro][,cache=auto|always|never|writeback]")]
    #[arg(value_parser = PathBufValueParser::new().try_map(share))]
    shares: Vec<ShareConfig>,

    #[command(flatten)]
    lifecycle: LifecycleArgs,

    #[command(flatten)]
    network: NetworkFlags,

    /// Print boot timings to standard error
    #[arg(long)]
    pub timings: bool,

    /// Read the machine configuration from a JSON file (see --print-config); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the machine configuration as JSON and exit
    #[arg(long)]
    print_config: bool,
}

impl Boot {
    /// Boots the machine and waits until it has ended.
    ///
    /// `started` is when the process started, as precisely as known.
    pub fn run(mut self, started: Instant) -> Result<Exit> {
        let mut config = self.machine_config()?;
        config.validate()?;
        if self.print_config {
            super::print_json(&config, "the configuration")?;
            return Ok(Exit::Success);
        }
        resources::host::check_memory(config.memory_target_mib.unwrap_or(config.memory_mib))?;
        self.lifecycle.check_cidfile()?;
        if self.lifecycle.spawns_detached() {
            return lifecycle::spawn_detached();
        }
        resources::host::warn_of_pvm();
        let timings = Arc::new(Timings::new(started));
        let info = RecordInfo {
            image: config.kernel.display().to_string(),
            image_id: None,
            command: Vec::new(),
            process: None,
            identity: None,
            mounts: Vec::new(),
            stop_signal: libc::SIGTERM as u8,
            stop_timeout: None,
            health_check: None,
        };
        let dir = self.lifecycle.dir()?;
        let name = self.lifecycle.name.clone().unwrap_or_else(|| dir.id());
        let _leases = join_shared(&mut config.networks, &name)?;
        let endpoint = self.lifecycle.endpoint(dir, info, &config)?;
        let exit = self.lifecycle.run_with_restarts(endpoint, false, |endpoint, signals| {
            let opened = resources::open(&config)?;
            Ok(report(&supervisor::run(&config, opened, timings.clone(), signals, Stdio::Console, endpoint)?))
        })?;
        if self.timings {
            super::print_stderr(&timings.to_string());
        }
        Ok(exit)
    }

    /// The configuration from the file, or the default one, modified by the flags. Lists of disks and networks replace
    /// the file's.
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
        config.default_cmdline = self.bare_cmdline.map_or(config.default_cmdline, |bare| !bare);
        if let Some(Cpus { vcpus, limit_millicpus }) = self.cpus {
            (config.cpus, config.cpu_limit_millicpus) = (vcpus, limit_millicpus);
        }
        config.nested = self.nested.unwrap_or(config.nested);
        config.transport = self.transport.unwrap_or(config.transport);
        if !self.disks.is_empty() {
            config.disks.clone_from(&self.disks);
        }
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        if !self.shares.is_empty() {
            config.shares.clone_from(&self.shares);
        }
        if !self.network.is_empty() {
            config.networks = self.network.configs()?;
        }
        self.network.limit(config.networks.iter_mut().map(|network| &mut network.rate))?;
        self.limits.apply(self.memory, &mut config);
        Ok(config)
    }
}

/// Reports why the machine ended, unless it ended normally.
pub fn report(reason: &ExitReason) -> Exit {
    let exit = Exit::from(reason);
    match exit {
        Exit::Success | Exit::Reported(_) => {}
        // The process that ended it must not be delayed by a stopped reader.
        Exit::Signal(_) => drop(terminal::say(&format!("husk: {reason}\n"), REPORT_TIMEOUT)),
        _ => super::print_error(&reason.to_string()),
    }
    exit
}

/// Parses `PATH[,OPTION]...`; the path may contain any bytes except a comma.
fn disk(argument: PathBuf) -> Result<DiskConfig, String> {
    let mut parts = argument.as_os_str().as_bytes().split(|&byte| byte == b',');
    let path = parts.next().unwrap_or_default().to_vec();
    let mut disk = DiskConfig::of(std::ffi::OsString::from_vec(path).into());
    for option in parts {
        if let Some(path) = option.strip_prefix(b"backing=") {
            let path = std::ffi::OsString::from_vec(path.to_vec()).into();
            disk.backing.push(BackingConfig { path, format: None });
            continue;
        }
        let option = String::from_utf8_lossy(option);
        let unknown = || {
            format!(
                "unknown option {option:?}: use ro, id=NAME, format=raw, format=qcow2, block_size=N, \
                 cache=writeback, cache=none, num_queues=N, aio=auto, aio=io_uring, aio=threads, backing=PATH, \
                 backing_format=raw, backing_format=qcow2, bps=SIZE, bps-burst=SIZE, iops=N or iops-burst=N"
            )
        };
        match option.split_once('=').unwrap_or((&option, "")) {
            ("ro", "") => disk.readonly = true,
            ("format", "raw") => disk.format = Some(Format::Raw),
            ("format", "qcow2") => disk.format = Some(Format::Qcow2),
            ("num_queues", text) => disk.queues = text.parse().map_err(|_| unknown())?,
            ("cache", "writeback") => disk.cache = Cache::Writeback,
            ("cache", "none") => disk.cache = Cache::None,
            ("aio", "auto") => disk.aio = Aio::Auto,
            ("aio", "io_uring") => disk.aio = Aio::IoUring,
            ("aio", "threads") => disk.aio = Aio::Threads,
            ("backing_format", format @ ("raw" | "qcow2")) => {
                let backing = disk.backing.last_mut().ok_or("backing_format= must follow a backing=")?;
                backing.format = Some(if format == "raw" { Format::Raw } else { Format::Qcow2 });
            }
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

/// Parses `PATH:TAG[,ro][,cache=MODE]`; the path may contain any bytes.
fn share(argument: PathBuf) -> Result<ShareConfig, String> {
    let bytes = argument.as_os_str().as_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b':').ok_or("use PATH:TAG")?;
    let (path, rest) = (bytes.get(..at).unwrap_or_default(), bytes.get(at + 1..).unwrap_or_default());
    let rest = String::from_utf8_lossy(rest);
    let mut words = rest.split(',');
    let tag = words.next().unwrap_or_default().to_owned();
    let mut share = ShareConfig::of(std::ffi::OsString::from_vec(path.to_vec()).into(), tag);
    for option in words {
        match option.split_once('=') {
            None if option == "ro" => share.readonly = true,
            Some(("cache", mode)) => share.cache = mode.parse()?,
            _ => return Err(format!("unknown option {option:?}: use ro, or cache=auto, always, never or writeback")),
        }
    }
    Ok(share)
}

/// Parses `PATH[,cid=N]`; the path may contain any bytes except a comma.
fn vsock(argument: PathBuf) -> Result<VsockConfig, String> {
    let mut parts = argument.as_os_str().as_bytes().split(|&byte| byte == b',');
    let socket = std::ffi::OsString::from_vec(parts.next().unwrap_or_default().to_vec()).into();
    let mut vsock = VsockConfig { socket, cid: DEFAULT_CID };
    for option in parts {
        let option = String::from_utf8_lossy(option);
        let cid = option.strip_prefix("cid=").and_then(|cid| cid.parse().ok());
        vsock.cid = cid.ok_or_else(|| format!("unknown option {option:?}: use cid=N"))?;
    }
    Ok(vsock)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::{Rate, ShareCache};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        boot: Boot,
    }

    fn parse(words: &[&str]) -> Boot {
        Cli::try_parse_from([&["boot"], words].concat()).map(|cli| cli.boot).unwrap()
    }

    #[test]
    fn flags_override_the_file() {
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
        let plain = DiskConfig::of("/x y.img".into());
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
        for (text, aio) in [("auto", Aio::Auto), ("io_uring", Aio::IoUring), ("threads", Aio::Threads)] {
            assert_eq!(disk(format!("/x y.img,aio={text}").into()), Ok(DiskConfig { aio, ..plain.clone() }));
        }
        for (text, cache) in [("writeback", Cache::Writeback), ("none", Cache::None)] {
            assert_eq!(disk(format!("/x y.img,cache={text}").into()), Ok(DiskConfig { cache, ..plain.clone() }));
        }
        let backing = |path: &str, format| BackingConfig { path: path.into(), format };
        let chain = vec![backing("/a b", Some(Format::Qcow2)), backing("c.img", None)];
        let wanted = DiskConfig { backing: chain, ..plain.clone() };
        assert_eq!(disk("/x y.img,backing=/a b,backing_format=qcow2,backing=c.img".into()), Ok(wanted));
        let wanted = DiskConfig { queues: 4, ..plain.clone() };
        assert_eq!(disk("/x y.img,num_queues=4".into()), Ok(wanted));
        let first = disk("x.img,backing_format=raw,backing=y".into()).unwrap_err();
        assert_eq!(first, "backing_format= must follow a backing=");
        for wrong in [
            "backing_format=vmdk",
            "num_queues=many",
            "cache=unsafe",
            "aio=native",
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
    fn a_share_is_a_path_a_tag_and_options() {
        let plain = ShareConfig::of("/a:b,c".into(), "work".into());
        assert_eq!(share("/a:b,c:work".into()), Ok(plain.clone()));
        let wanted = ShareConfig { readonly: true, cache: ShareCache::Always, ..plain };
        assert_eq!(share("/a:b,c:work,ro,cache=always".into()), Ok(wanted));
        for wrong in ["/a", "/a:t,rw", "/a:t,cache=", "/a:t,"] {
            assert!(share(wrong.into()).is_err(), "{wrong}");
        }
        let mut config = MachineConfig { kernel: "k".into(), ..MachineConfig::default() };
        let invalid = |shares: &[&str], config: &mut MachineConfig| {
            config.shares = shares.iter().map(|text| share(text.into()).unwrap()).collect();
            config.validate().err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(invalid(&["/a:t", "/a:u"], &mut config), "");
        assert!(invalid(&["/a:t", "/b:t"], &mut config).contains("used twice"));
        assert!(invalid(&[":t"], &mut config).contains("no path"));
        assert!(invalid(&["/a:"], &mut config).contains("invalid share tag"));
        assert!(invalid(&[&format!("/a:{}", "t".repeat(37))], &mut config).contains("invalid share tag"));
    }

    #[test]
    fn sockets_are_a_path_and_an_address() {
        let socket = PathBuf::from("/run/v.sock");
        assert_eq!(vsock("/run/v.sock".into()), Ok(VsockConfig { socket: socket.clone(), cid: 3 }));
        assert_eq!(vsock("/run/v.sock,cid=52".into()), Ok(VsockConfig { socket, cid: 52 }));
        for wrong in ["v.sock,", "v.sock,cid=", "v.sock,cid=-1", "v.sock,ro"] {
            assert!(vsock(wrong.into()).unwrap_err().contains("use cid=N"), "{wrong}");
        }
        let config = parse(&["--kernel=b", "--vsock=v.sock,cid=9"]).machine_config().unwrap();
        assert_eq!(config.vsock, Some(VsockConfig { socket: "v.sock".into(), cid: 9 }));
    }
}
