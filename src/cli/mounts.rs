//! The flags of `husk run` that put folders of the host into the machine: `-v` and `--mount`, as Docker has them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::Tmpfs;

use crate::guest::process;
use crate::guest::shares::Share;
use crate::image::{Store, volumes};

// Folders of the host.
#[derive(Debug, Args)]
pub(super) struct MountFlags {
    /// Mount a file or folder of the host, or a volume, with `:ro` read-only; can be repeated
    ///
    /// HOST is an absolute path, or one that starts with `./` or `../`; a folder that does not exist is created. NAME is
    /// a volume, which is created on first use (see `husk volume`). Users of the machine are users of the host, if husk
    /// runs as root; otherwise root of the machine is you.
    #[arg(short, long, value_name = "SOURCE:PATH[:OPTIONS]")]
    volume: Vec<OsString>,

    /// Mount a file or folder of the host, a volume or a tmpfs; can be repeated
    ///
    /// For example type=bind,source=./src,target=/src,readonly or type=volume,source=NAME,target=/data or
    /// type=tmpfs,target=/tmp,tmpfs-size=64m.
    #[arg(long, value_name = "KEY=VALUE,...")]
    mount: Vec<OsString>,
}

/// What is mounted where.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mount {
    /// A file or folder of the host: `creates` it if there is none.
    Bind {
        source: PathBuf,
        target: Vec<u8>,
        readonly: bool,
        creates: bool,
    },
    Volume {
        name: String,
        target: Vec<u8>,
        readonly: bool,
    },
    Tmpfs(Tmpfs),
}

impl MountFlags {
    /// What is to be mounted.
    pub fn parse(&self) -> Result<Vec<Mount>> {
        let volumes = self.volume.iter().map(|word| parse_volume(word).with_context(|| context("-v", word)));
        let mounts = self.mount.iter().map(|word| parse_mount(word).with_context(|| context("--mount", word)));
        let all = volumes.chain(mounts).collect::<Result<Vec<_>>>()?;
        check_distinct(&all)?;
        Ok(all)
    }
}

impl Mount {
    fn target(&self) -> &Path {
        let (Mount::Bind { target, .. } | Mount::Volume { target, .. } | Mount::Tmpfs(Tmpfs { path: target, .. })) =
            self;
        Path::new(std::ffi::OsStr::from_bytes(target))
    }
}

/// Fails if one of them would hide another one.
fn check_distinct(mounts: &[Mount]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    let twice = mounts.iter().map(Mount::target).find(|target| !seen.insert(*target));
    twice.map_or(Ok(()), |target| bail!("two mounts on {}: remove one of them", target.display()))
}

/// Opens what is shared with the host, and adds the rest to `tmpfs`. Creates folders and volumes that do not exist. The volumes
/// stay as long as the files that are returned.
pub(super) fn open(mounts: Vec<Mount>, tmpfs: &mut Vec<Tmpfs>) -> Result<(Vec<Share>, Vec<File>)> {
    let (mut shares, mut locks) = (Vec::new(), Vec::new());
    for mount in mounts {
        let (source, target, readonly) = match mount {
            Mount::Tmpfs(mount) => {
                tmpfs.push(mount);
                continue;
            }
            Mount::Volume { name, target, readonly } => {
                let volume = Store::open_default()?.use_volume(&name)?;
                locks.push(volume.lock);
                (volume.path, target, readonly)
            }
            Mount::Bind { source, target, readonly, creates } => {
                if creates && !source.exists() {
                    fs::create_dir_all(&source).with_context(|| format!("create {}", source.display()))?;
                }
                (source, target, readonly)
            }
        };
        let found = fs::metadata(&source).with_context(|| format!("share {}", source.display()))?;
        // Another command may run in another directory.
        let source = std::path::absolute(&source).with_context(|| format!("find {}", source.display()))?;
        shares.push(Share::new(shares.len(), source, found.is_file(), target, readonly));
    }
    Ok((shares, locks))
}

fn context(flag: &str, word: &OsString) -> String {
    format!("{flag} {}", word.to_string_lossy())
}

/// Parses `SOURCE:PATH[:OPTIONS]`.
fn parse_volume(word: &OsString) -> Result<Mount> {
    let mut parts = word.as_bytes().split(|byte| *byte == b':');
    let (source, target, options) = (parts.next().unwrap_or_default(), parts.next(), parts.next().unwrap_or_default());
    ensure!(parts.next().is_none(), "too many colons: use HOST:MACHINE[:ro]");
    let Some(target) = target else {
        bail!("no path in the machine: use HOST:MACHINE[:ro], or NAME:MACHINE for a volume")
    };
    let mut readonly = false;
    for option in options.split(|byte| *byte == b',').filter(|option| !option.is_empty()) {
        match option {
            b"ro" | b"readonly" => readonly = true,
            // Labels and propagation of mounts of the host, which no machine sees.
            b"rw" | b"z" | b"Z" | b"cached" | b"delegated" | b"consistent" | b"nocopy" | b"private" | b"rprivate"
            | b"slave" | b"rslave" | b"shared" | b"rshared" | b"bind" | b"rbind" => {}
            other => bail!("unknown option {:?}: use ro or rw", String::from_utf8_lossy(other)),
        }
    }
    bind_or_volume(source, target, readonly, true)
}

fn bind_or_volume(source: &[u8], target: &[u8], readonly: bool, creates: bool) -> Result<Mount> {
    let target = checked_target(target)?;
    ensure!(!source.is_empty(), "no source: use HOST:MACHINE[:ro]");
    if matches!(source, [b'/' | b'.', ..]) {
        let source = PathBuf::from(OsString::from_vec(source.to_vec()));
        return Ok(Mount::Bind { source, target, readonly, creates });
    }
    let name = String::from_utf8_lossy(source).into_owned();
    volumes::check_name(&name)?;
    Ok(Mount::Volume { name, target, readonly })
}

fn checked_target(target: &[u8]) -> Result<Vec<u8>> {
    let path = Path::new(std::ffi::OsStr::from_bytes(target));
    let climbs = path.components().any(|part| part == Component::ParentDir);
    ensure!(
        path.is_absolute() && path.parent().is_some() && !climbs,
        "{} is not a mount point: use an absolute path in the machine, other than / and without `..`",
        path.display()
    );
    Ok(target.to_vec())
}

/// Parses `KEY=VALUE,...`.
fn parse_mount(word: &OsString) -> Result<Mount> {
    let (mut kind, mut source, mut target, mut readonly) = (&b"volume"[..], None, None, false);
    let mut options = Vec::new();
    for part in word.as_bytes().split(|byte| *byte == b',') {
        let at = part.iter().position(|byte| *byte == b'=').unwrap_or(part.len());
        let (key, value) = (part.get(..at).unwrap_or_default(), part.get(at + 1..));
        match (key, value) {
            (b"type", Some(value)) => kind = value,
            (b"source" | b"src", Some(value)) => source = Some(value),
            (b"target" | b"dst" | b"destination", Some(value)) => target = Some(value),
            (b"readonly" | b"ro", None | Some(b"true" | b"1")) => readonly = true,
            (b"readonly" | b"ro", Some(b"false" | b"0")) => readonly = false,
            (b"tmpfs-size", Some(value)) => options.push(format!("size={}", String::from_utf8_lossy(value))),
            (b"tmpfs-mode", Some(value)) => options.push(format!("mode={}", String::from_utf8_lossy(value))),
            (b"bind-propagation" | b"consistency" | b"relabel" | b"volume-nocopy" | b"bind-recursive", _) => {}
            (key, _) => bail!("unknown key {:?}: use type, source, target or readonly", String::from_utf8_lossy(key)),
        }
    }
    let target = target.context("no target: use target=PATH")?;
    match kind {
        b"bind" => {
            let source = source.context("no source: use source=PATH")?;
            // A relative path is one here, without any dot.
            let source = PathBuf::from(OsString::from_vec(source.to_vec()));
            Ok(Mount::Bind { source, target: checked_target(target)?, readonly, creates: false })
        }
        b"volume" => {
            let source = source.context("no source: use source=NAME for a volume")?;
            ensure!(!matches!(source, [b'/' | b'.', ..]), "a volume has a name: use type=bind for a path");
            bind_or_volume(source, target, readonly, false)
        }
        b"tmpfs" => {
            options.extend(readonly.then(|| "ro".to_owned()));
            let text = format!("{}:{}", String::from_utf8_lossy(target), options.join(","));
            process::tmpfs(&text).map(Mount::Tmpfs).map_err(anyhow::Error::msg)
        }
        other => bail!("unknown type {:?}: use bind, volume or tmpfs", String::from_utf8_lossy(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: &str, target: &str, readonly: bool, creates: bool) -> Mount {
        Mount::Bind { source: source.into(), target: target.into(), readonly, creates }
    }

    #[test]
    fn a_volume_is_a_source_a_path_and_options() {
        let parse = |text: &str| parse_volume(&text.into()).map_err(|error| error.to_string());
        assert_eq!(parse("/a:/b"), Ok(bind("/a", "/b", false, true)));
        assert_eq!(parse("./a b:/b:ro,Z"), Ok(bind("./a b", "/b", true, true)));
        assert_eq!(parse(".:/src:rw"), Ok(bind(".", "/src", false, true)));
        assert_eq!(parse("../x:/b:z"), Ok(bind("../x", "/b", false, true)));
        let volume = Mount::Volume { name: "data".into(), target: "/var/lib".into(), readonly: true };
        assert_eq!(parse("data:/var/lib:ro"), Ok(volume));
        for (wrong, why) in [
            ("/a", "no path in the machine"),
            ("/a:b", "not a mount point"),
            ("/a:/", "not a mount point"),
            ("/a:/b/..", "not a mount point"),
            (":/b", "no source"),
            ("/a:/b:rx", "unknown option"),
            ("/a:/b:ro:x", "too many colons"),
            ("a b:/c", "volume name"),
            ("a/b:/c", "volume name"),
        ] {
            assert!(parse(wrong).unwrap_err().contains(why), "{wrong}: {:?}", parse(wrong));
        }
    }

    #[test]
    fn a_mount_is_a_list_of_keys() {
        let parse = |text: &str| parse_mount(&text.into()).map_err(|error| error.to_string());
        assert_eq!(parse("type=bind,source=a,target=/b,readonly"), Ok(bind("a", "/b", true, false)));
        assert_eq!(parse("type=bind,src=/a,dst=/b,ro=false"), Ok(bind("/a", "/b", false, false)));
        let volume = Mount::Volume { name: "data".into(), target: "/d".into(), readonly: false };
        assert_eq!(parse("source=data,destination=/d"), Ok(volume));
        let Ok(Mount::Tmpfs(tmpfs)) = parse("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777") else { panic!() };
        assert_eq!((tmpfs.path.as_slice(), tmpfs.options.as_str()), (&b"/t"[..], "size=1m,mode=1777"));
        for (wrong, why) in [
            ("type=bind,source=/a", "no target"),
            ("type=bind,target=/a", "no source"),
            ("type=npipe,source=/a,target=/b", "unknown type"),
            ("type=bind,source=/a,target=/b,uid=3", "unknown key"),
            ("source=/a,target=/b", "type=bind"),
        ] {
            assert!(parse(wrong).unwrap_err().contains(why), "{wrong}: {:?}", parse(wrong));
        }
    }

    #[test]
    fn one_mount_does_not_hide_another_one() {
        let check = |targets: &[&str]| {
            let words = targets.iter().map(|target| format!("/a:{target}").into());
            check_distinct(&words.map(|word| parse_volume(&word).unwrap()).collect::<Vec<_>>())
        };
        check(&["/b", "/b/c", "/c"]).unwrap();
        assert!(check(&["/b", "/c", "//b/"]).unwrap_err().to_string().contains("two mounts on //b/"));
    }
}
