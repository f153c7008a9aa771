//! What a container is in its guest: from the configuration's terms to those of husk's init.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::{
    Capabilities, Container, Credentials, Device, Limit, Mount, MountSource, Process, Rights, WindowSize,
};
use rustix::fs::{major, minor, statfs};

use super::config::{self, Config};
use super::machine::first_limits;
use super::pod::Pod;
use crate::guest::{capability, process};

/// The directory of a container's part of the share with the root file system.
pub const ROOTFS: &str = "rootfs";
/// The directory of it with what is mounted there, by number.
pub const MOUNTS: &str = "mounts";
/// TMPFS_MAGIC (linux/magic.h)
pub const TMPFS: u64 = 0x0102_1994;
/// The namespaces that a container has in its guest, with their flags.
const NAMESPACES: [(&str, i32); 5] = [
    ("pid", libc::CLONE_NEWPID),
    ("mount", libc::CLONE_NEWNS),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];
/// Options of mounts that are flags besides those of a tmpfs, in the same form.
const MORE_FLAGS: [(&str, u64, bool); 12] = [
    ("bind", libc::MS_BIND, true),
    ("rbind", libc::MS_BIND | libc::MS_REC, true),
    ("dirsync", libc::MS_DIRSYNC, true),
    ("nodiratime", libc::MS_NODIRATIME, true),
    ("diratime", libc::MS_NODIRATIME, false),
    ("relatime", libc::MS_RELATIME, true),
    ("norelatime", libc::MS_RELATIME, false),
    ("strictatime", libc::MS_STRICTATIME, true),
    ("nostrictatime", libc::MS_STRICTATIME, false),
    ("silent", libc::MS_SILENT, true),
    ("mand", libc::MS_MANDLOCK, true),
    ("nomand", libc::MS_MANDLOCK, false),
];
/// Options about the propagation of mounts between the host and the container, which are in different kernels.
const PROPAGATIONS: [&str; 9] =
    ["private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable", "defaults"];

/// A folder or file of the host that is mounted in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Its path, relative to the bundle.
    pub source: std::path::PathBuf,
    /// The path in the container's part of the share.
    pub place: String,
    /// Whether it is read-only.
    pub readonly: bool,
    /// Whether what is mounted in it is there as well.
    pub is_recursive: bool,
}

/// The container `id` of `config`, whose bundle is `bundle`, and what is shared for it. `pod` is what it has in common with others
/// of a machine that exists.
pub fn container(id: &str, config: &Config, bundle: &Path, pod: Option<&Pod>) -> Result<(Container, Vec<Bind>)> {
    let mut container = Container {
        id: id.to_owned(),
        root: format!("{id}/{ROOTFS}"),
        readonly: config.root.readonly,
        namespaces: namespaces(config, pod)?,
        joined: pod.map(Pod::joined).unwrap_or_default(),
        hostname: hostname(config),
        domainname: config.domainname.clone(),
        masked_paths: config.linux.masked_paths.iter().map(|path| path.clone().into_bytes()).collect(),
        readonly_paths: config.linux.readonly_paths.iter().map(|path| path.clone().into_bytes()).collect(),
        sysctls: config.linux.sysctl.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        limits: first_limits(&config.linux.resources, pod.is_some()),
        ..Container::default()
    };
    let mut binds = Vec::new();
    for mount in &config.mounts {
        let what = || format!("mount {}", mount.destination);
        ensure!(mount.destination.starts_with('/'), "{}: its destination is not absolute", what());
        match translate(mount, bundle, id, binds.len()).with_context(what)? {
            Translated::FileSystem(mount) => container.mounts.push(mount),
            Translated::Bind(mount, bind) => {
                container.mounts.push(mount);
                binds.push(bind);
            }
            Translated::Device(device) => container.devices.push(device),
        }
    }
    for device in &config.linux.devices {
        container.devices.extend(self::device(device).with_context(|| format!("device {}", device.path))?);
    }
    Ok((container, binds))
}

/// Without a UTS namespace, a container has the host's name.
fn hostname(config: &Config) -> String {
    if config.hostname.is_empty() && config.namespace("uts").is_none() {
        return rustix::system::uname().nodename().to_string_lossy().into_owned();
    }
    config.hostname.clone()
}

fn namespaces(config: &Config, pod: Option<&Pod>) -> Result<u32> {
    let is_joined = |name: &str| pod.is_some_and(|pod| pod.namespaces.iter().any(|joined| joined.kind == name));
    let of_another = |kind: &&config::Namespace| {
        let is_guests = NAMESPACES.iter().any(|(name, _)| *name == kind.kind);
        !kind.path.as_os_str().is_empty() && is_guests && !is_joined(&kind.kind)
    };
    if let Some(namespace) = config.linux.namespaces.iter().find(of_another) {
        bail!(
            "the {} namespace {} is none of a running container of husk's: a machine does not share it",
            namespace.kind,
            namespace.path.display()
        );
    }
    ensure!(
        config.namespace("user").is_none() && config.linux.uid_mappings.is_empty(),
        "user namespaces are not supported: a machine separates users by itself"
    );
    let own = NAMESPACES.iter().filter(|(kind, _)| config.namespace(kind).is_some() && !is_joined(kind));
    let flags = own.fold(0, |all, (_, flag)| all | flag.unsigned_abs());
    // The machine has one root, which is not the container's.
    Ok(flags | libc::CLONE_NEWNS.unsigned_abs())
}

fn flags() -> impl Iterator<Item = &'static (&'static str, u64, bool)> {
    process::MOUNT_FLAGS.iter().chain(&MORE_FLAGS)
}

/// The flag of mount(2) that an option of mounts stands for, and whether it sets or clears it.
pub fn flag_of(option: &str) -> Option<(u64, bool)> {
    flags().find(|(name, _, _)| *name == option).map(|(_, bits, sets)| (*bits, *sets))
}

/// The options of mounts that are known, besides those of file systems.
pub fn mount_options() -> Vec<&'static str> {
    flags().map(|(name, _, _)| *name).chain(PROPAGATIONS).chain(["tmpcopyup"]).collect()
}

enum Translated {
    FileSystem(Mount),
    Bind(Mount, Bind),
    Device(Device),
}

fn translate(mount: &config::Mount, bundle: &Path, id: &str, number: usize) -> Result<Translated> {
    let (flags, data) = options(&mount.options)?;
    let target = mount.destination.clone().into_bytes();
    if flags & libc::MS_BIND == 0 && mount.kind != "bind" {
        // A device of the host is none of the machine's, and neither is a tag of a file system that the machine shares.
        let is_tag = matches!(mount.kind.as_str(), "virtiofs" | "9p");
        let named = mount.source.to_str().filter(|name| !name.is_empty() && !name.contains('/') && !is_tag);
        let (kind, name) = (mount.kind.clone(), named.unwrap_or(&mount.kind).to_owned());
        let source = MountSource::FileSystem { kind, options: data.join(","), name };
        return Ok(Translated::FileSystem(Mount { target, source, flags }));
    }
    let path = bundle.join(&mount.source);
    let found = fs::metadata(&path).with_context(|| path.display().to_string())?;
    let kind = found.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        let (mode, uid, gid) = (found.mode(), found.uid(), found.gid());
        let (major, minor) = (major(found.rdev()), minor(found.rdev()));
        return Ok(Translated::Device(Device { path: target, mode, major, minor, uid, gid }));
    }
    if let Some(mount) = shared_memory(mount, &path, flags) {
        return Ok(Translated::FileSystem(mount));
    }
    let place = format!("{MOUNTS}/{number}");
    let source = MountSource::Share(format!("{id}/{place}"));
    let bind = Bind {
        source: path,
        place,
        readonly: flags & libc::MS_RDONLY != 0,
        is_recursive: flags & libc::MS_REC != 0 || mount.kind == "bind" && flags & libc::MS_BIND == 0,
    };
    Ok(Translated::Bind(Mount { target, source, flags: flags & !libc::MS_BIND }, bind))
}

/// A file system of an engine's for the shared memory of a container or a pod, which in a machine is memory of the guest: of that name, for
/// whoever has the same.
fn shared_memory(mount: &config::Mount, path: &Path, flags: u64) -> Option<Mount> {
    let is_engines = mount.destination == "/dev/shm" && path != Path::new("/dev/shm");
    let found = is_engines.then(|| statfs(path).ok()).flatten()?;
    if found.f_type as u64 != TMPFS {
        return None;
    }
    let bytes = found.f_blocks.saturating_mul(u64::try_from(found.f_bsize).ok()?);
    let size = if bytes == 0 { String::new() } else { format!(",size={bytes}") };
    // Of one file system, but not of a later one with its number.
    let name = format!("shm{}x{:08x}", fs::metadata(path).ok()?.dev(), crc32fast::hash(path.as_os_str().as_bytes()));
    let source = MountSource::Memory { name, options: format!("mode=1777{size}") };
    Some(Mount {
        target: mount.destination.clone().into_bytes(),
        source,
        flags: flags & !(libc::MS_BIND | libc::MS_REC),
    })
}

/// The flags of mount(2), and what is left for the file system.
fn options(words: &[String]) -> Result<(u64, Vec<&str>)> {
    let (mut flags, mut data) = (0, Vec::new());
    for word in words {
        if let Some((_, bits, sets)) = self::flags().find(|(name, _, _)| name == word) {
            flags = if *sets { flags | bits } else { flags & !bits };
        } else if ["idmap", "ridmap"].iter().any(|name| word.split('=').next() == Some(*name)) {
            bail!("option {word}: ID-mapped mounts are not supported");
        } else if word == "rro" {
            bail!("option rro: only the mount itself can be read-only (ro)");
        } else if !PROPAGATIONS.contains(&word.as_str()) {
            ensure!(!word.contains(','), "option {word:?} contains a comma");
            data.push(word.as_str());
        }
    }
    Ok((flags, data))
}

/// `None` for a device that every container has.
fn device(device: &config::Device) -> Result<Option<Device>> {
    let kind = match device.kind.as_str() {
        "c" | "u" => libc::S_IFCHR,
        "b" => libc::S_IFBLK,
        "p" => libc::S_IFIFO,
        other => bail!("{other:?} is not a type of a device: use c, u, b or p"),
    };
    let number = |number: i64| u32::try_from(number).context("it has no valid number");
    Ok(Some(Device {
        path: device.path.clone().into_bytes(),
        mode: kind | device.file_mode.unwrap_or(0o666) & 0o7777,
        major: number(device.major)?,
        minor: number(device.minor)?,
        uid: device.uid,
        gid: device.gid,
    }))
}

/// The process of `config`. It reads standard input, which is the engine's to end.
pub fn process(config: &config::Process, seccomp: Option<&crate::guest::seccomp::Profile>) -> Result<Process> {
    ensure!(!config.args.is_empty(), "process.args is empty");
    ensure!(config.cwd.starts_with('/'), "process.cwd {:?} is not absolute", config.cwd);
    let capabilities = capabilities(config.capabilities.as_ref())?;
    let compile = |profile: &crate::guest::seccomp::Profile| profile.compile(capabilities.bounding);
    let filter = seccomp.map(compile).transpose().context("linux.seccomp")?;
    let bytes = |words: &[String]| words.iter().map(|word| word.clone().into_bytes()).collect();
    let size = config
        .console_size
        .map_or(WindowSize { rows: 24, columns: 80 }, |size| WindowSize { rows: size.height, columns: size.width });
    let user = &config.user;
    Ok(Process {
        args: bytes(&config.args),
        env: bytes(&config.env),
        working_dir: config.cwd.clone().into_bytes(),
        terminal: config.terminal.then_some(size),
        stdin: true,
        limits: config.rlimits.iter().map(limit).collect::<Result<_>>()?,
        rights: Rights { no_new_privileges: config.no_new_privileges, filter, ..Rights::default() },
        credentials: Some(Credentials {
            uid: user.uid,
            gid: user.gid,
            groups: user.additional_gids.clone(),
            umask: user.umask,
            capabilities,
            oom_score_adj: config.oom_score_adj,
        }),
        ..Process::default()
    })
}

fn limit(limit: &config::Limit) -> Result<Limit> {
    let name = limit.kind.strip_prefix("RLIMIT_").unwrap_or(&limit.kind).to_ascii_lowercase();
    // Docker has no name for it.
    let resource = if name == "as" { Some(libc::RLIMIT_AS) } else { process::resource(&name) };
    let resource = resource.with_context(|| format!("unknown resource limit {:?}", limit.kind))?;
    ensure!(limit.soft <= limit.hard, "{}: the soft limit exceeds the hard limit", limit.kind);
    Ok(Limit { resource, soft: limit.soft, hard: limit.hard })
}

/// Without any, a process has none. A name that is unknown here is one that no kernel of a guest has, and is left out.
fn capabilities(sets: Option<&config::Capabilities>) -> Result<Capabilities> {
    let Some(sets) = sets else { return Ok(Capabilities::default()) };
    let mask =
        |names: &[String]| names.iter().filter_map(|name| capability::mask(name).ok()).fold(0, |all, mask| all | mask);
    Ok(Capabilities {
        bounding: mask(&sets.bounding),
        effective: mask(&sets.effective),
        inheritable: mask(&sets.inheritable),
        permitted: mask(&sets.permitted),
        ambient: mask(&sets.ambient),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{
        "ociVersion": "1.0.2-dev",
        "process": { "terminal": true, "consoleSize": { "height": 30, "width": 100 }, "args": ["sh", "-c", "id"],
            "user": { "uid": 1000, "gid": 100, "umask": 18, "additionalGids": [4, 5] }, "env": ["PATH=/bin"], "cwd": "/tmp",
            "capabilities": { "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512 }, { "type": "RLIMIT_AS", "hard": 9, "soft": 8 }], "noNewPrivileges": true, "oomScoreAdj": 100 },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "box",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["rprivate", "size=1m", "mode=755", "tmpcopyup"] },
            { "destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind", "ro", "rprivate"] },
            { "destination": "/null", "type": "bind", "source": "/dev/null", "options": ["bind"] } ],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/run/netns/x" }, { "type": "mount" }],
            "resources": { "pids": { "limit": 20 } }, "sysctl": { "net.core.somaxconn": "9" },
            "devices": [{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438 }],
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"] },
        "unknown": 7 }"#;

    #[test]
    fn a_container_is_described_in_the_guests_terms() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("hosts"), "").unwrap();
        let config = Config::parse(CONFIG.as_bytes()).unwrap();
        let (container, binds) = container("c", &config, dir.path(), None).unwrap();
        assert_eq!(container.namespaces, (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u32);
        assert!(
            container.readonly
                && container.hostname == "box"
                && container.limits == [("pids.max".to_owned(), "20".to_owned())]
        );
        let plain = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
        let kinds: Vec<_> = container.mounts.iter().map(|mount| (mount.source.clone(), mount.flags)).collect();
        let file_system = |kind: &str, options: &str| MountSource::FileSystem {
            kind: kind.into(),
            options: options.into(),
            name: kind.into(),
        };
        assert_eq!(
            kinds,
            [
                (file_system("proc", ""), plain),
                (file_system("tmpfs", "size=1m,mode=755,tmpcopyup"), 0),
                (MountSource::Share("c/mounts/0".into()), libc::MS_RDONLY),
            ]
        );
        let [bind] = &binds[..] else { panic!("{binds:?}") };
        assert!(bind.readonly && !bind.is_recursive && bind.source == dir.path().join("hosts"));
        let devices: Vec<_> = container.devices.iter().map(|device| (device.major, device.minor)).collect();
        assert_eq!(devices, [(1, 3), (10, 229)]);
        assert_eq!(container.sysctls, [("net.core.somaxconn".to_owned(), "9".to_owned())]);
    }

    #[test]
    fn a_container_without_a_name_of_its_own_has_the_hosts() {
        let name = |json: &str| {
            let config = Config::parse(json.as_bytes()).unwrap();
            container("c", &config, Path::new("/"), None).unwrap().0.hostname
        };
        let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(name("{}"), own.trim());
        assert_eq!(name(r#"{"linux":{"namespaces":[{"type":"uts"}]}}"#), "");
        assert_eq!(name(r#"{"hostname":"box"}"#), "box");
    }

    #[test]
    fn a_process_has_the_numbers_of_its_configuration() {
        let config = Config::parse(CONFIG.as_bytes()).unwrap();
        let process = process(config.process.as_ref().unwrap(), None).unwrap();
        assert_eq!(process.terminal, Some(WindowSize { rows: 30, columns: 100 }));
        let credentials = process.credentials.unwrap();
        assert_eq!((credentials.uid, credentials.gid, credentials.groups), (1000, 100, vec![4, 5]));
        assert_eq!((credentials.umask, credentials.oom_score_adj), (Some(0o22), Some(100)));
        assert_eq!((credentials.capabilities.bounding, credentials.capabilities.effective), (0b10_0001, 1));
        let limit = |resource, soft, hard| Limit { resource, soft, hard };
        assert_eq!(process.limits, [limit(libc::RLIMIT_NOFILE, 512, 1024), limit(libc::RLIMIT_AS, 8, 9)]);
        assert!(process.rights.no_new_privileges && process.stdin);
    }

    #[test]
    fn what_a_machine_cannot_do_is_refused_by_its_name() {
        let refused = |json: &str| {
            let config = Config::parse(json.as_bytes()).unwrap();
            let process = config.process.as_ref().map_or(Ok(()), |config| process(config, None).map(drop));
            format!("{:#}", process.and(container("c", &config, Path::new("/"), None).map(drop)).unwrap_err())
        };
        for (json, word) in [
            (r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#, "pid namespace"),
            (r#"{"linux":{"namespaces":[{"type":"user"}]}}"#, "user namespaces"),
            (r#"{"mounts":[{"destination":"/a","type":"bind","source":"/","options":["bind","idmap"]}]}"#, "idmap"),
            (r#"{"mounts":[{"destination":"/a","type":"bind","source":"/","options":["rbind","rro"]}]}"#, "rro"),
            (r#"{"mounts":[{"destination":"a","type":"tmpfs"}]}"#, "not absolute"),
            (r#"{"mounts":[{"destination":"/a","type":"bind","source":"/no/such","options":[]}]}"#, "/no/such"),
            (r#"{"process":{"cwd":"/","args":[]}}"#, "process.args"),
            (r#"{"process":{"cwd":"x","args":["a"]}}"#, "process.cwd"),
            (r#"{"process":{"cwd":"/","args":["a"],"rlimits":[{"type":"RLIMIT_X","soft":1,"hard":1}]}}"#, "RLIMIT_X"),
            (r#"{"linux":{"devices":[{"path":"/dev/x","type":"z"}]}}"#, "\"z\""),
        ] {
            let told = refused(json);
            assert!(told.contains(word), "{json}: {told}");
        }
    }
}
