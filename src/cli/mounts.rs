//! The flags of `husk run` that put folders of the host into the machine: `-v` and `--mount`, as Docker has them.

pub mod place;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::Tmpfs;

use crate::config::ShareCache;
use crate::guest::process;
use crate::image::volumes;

// Folders of the host.
#[derive(Debug, Args)]
pub(super) struct MountFlags {
    /// Mount a file or folder of the host, or a volume, with `:ro` read-only; can be repeated
    ///
    /// HOST is an absolute path, or one that starts with `./` or `../`; a folder that does not exist is created. NAME is
    /// a volume, which is created on first use (see `husk volume`), and an empty one gets what the image has at PATH,
    /// unless `:nocopy` is added. PATH alone is an anonymous volume. With `:U`, all in it becomes the user's who runs the
    /// command. Users of the machine are users of the host, if husk runs as root; otherwise root of the machine is you.
    /// `:cache=always` is faster, for a folder that only this machine changes; with `:cache=never` the machine sees each change
    /// by the host at once, and with `auto`, the default, after a second. `:cache=writeback` is `always`, and what the machine
    /// writes reaches the host later, at the latest when the file is closed.
    #[arg(short, long, value_name = "[SOURCE:]PATH[:OPTIONS]")]
    volume: Vec<OsString>,

    /// Mount a file or folder of the host, a volume or a tmpfs; can be repeated
    ///
    /// For example type=bind,source=./src,target=/src,readonly or type=volume,source=NAME,target=/data or
    /// type=tmpfs,target=/tmp,tmpfs-size=64m.
    #[arg(long, value_name = "KEY=VALUE,...")]
    mount: Vec<OsString>,

    /// Mount what another machine mounts from the host, in the same places; can be repeated
    #[arg(long, value_name = "MACHINE[:ro]")]
    volumes_from: Vec<String>,
}

/// What is mounted where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    source: Source,
    target: Vec<u8>,
    access: Access,
}

/// What is mounted.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    /// A file or folder of the host: `creates` it if there is none.
    Bind {
        path: PathBuf,
        creates: bool,
    },
    /// The volume with this name, or an anonymous one.
    Volume(Option<String>),
    Tmpfs(Tmpfs),
}

/// How it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Access {
    readonly: bool,
    /// Whether a volume that is empty gets the image's content.
    copies: bool,
    /// Whether all in it becomes the user's who runs the command.
    owned: bool,
    /// What the machine's kernel keeps of it.
    cache: ShareCache,
}

impl Default for Access {
    fn default() -> Access {
        Access { readonly: false, copies: true, owned: false, cache: ShareCache::default() }
    }
}

impl Access {
    fn check(self) -> Result<()> {
        ensure!(
            !self.owned || !self.readonly,
            "U gives the files to another user, which ro forbids: remove one of them"
        );
        Ok(())
    }
}

impl MountFlags {
    /// Takes out what is meant as `--verbose` and was parsed as a volume, which it cannot be: `-vv` and `-vvv`. Returns how often.
    pub fn take_verbosity(&mut self) -> u8 {
        let is_volume = |word: &OsString| word.is_empty() || word.as_bytes().iter().any(|letter| *letter != b'v');
        let taken = self.volume.iter().filter(|word| !is_volume(word)).map(|word| word.len() + 1).sum::<usize>();
        self.volume.retain(is_volume);
        u8::try_from(taken).unwrap_or(u8::MAX)
    }

    /// What is to be mounted.
    pub fn parse(&self) -> Result<Vec<Mount>> {
        let volumes = self.volume.iter().map(|word| parse_volume(word).with_context(|| context("-v", word)));
        let mounts = self.mount.iter().map(|word| parse_mount(word).with_context(|| context("--mount", word)));
        let all = volumes.chain(mounts).collect::<Result<Vec<_>>>()?;
        check_distinct(&all)?;
        Ok(all)
    }

    /// What other machines have mounted, and this one is to mount as well.
    pub fn inherited(&self) -> Result<Vec<Mount>> {
        place::of_machines(&self.volumes_from)
    }
}

impl Mount {
    fn anonymous(target: Vec<u8>) -> Mount {
        Mount { source: Source::Volume(None), target, access: Access::default() }
    }

    fn target(&self) -> &Path {
        path(&self.target)
    }

    /// The same, read-only if it was or if `readonly`.
    fn with_readonly(mut self, readonly: bool) -> Mount {
        self.access.readonly |= readonly;
        self
    }
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

/// Fails if one of them would hide another one.
fn check_distinct(mounts: &[Mount]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    let twice = mounts.iter().map(Mount::target).find(|target| !seen.insert(*target));
    twice.map_or(Ok(()), |target| bail!("two mounts on {}: remove one of them", target.display()))
}

/// Parses `MACHINE[:ro]`: the machine, and whether its mounts are to be read-only.
fn volumes_from(word: &str) -> Result<(&str, bool)> {
    let (name, mode) = word.split_once(':').unwrap_or((word, "rw"));
    match mode {
        "rw" | "z" | "Z" => Ok((name, false)),
        "ro" => Ok((name, true)),
        other => bail!("--volumes-from {word}: unknown option {other:?}: use ro or rw"),
    }
}

fn context(flag: &str, word: &OsString) -> String {
    format!("{flag} {}", word.to_string_lossy())
}

/// Parses `[SOURCE:]PATH[:OPTIONS]`.
fn parse_volume(word: &OsString) -> Result<Mount> {
    let mut parts = word.as_bytes().split(|byte| *byte == b':');
    let (source, target, options) = (parts.next().unwrap_or_default(), parts.next(), parts.next().unwrap_or_default());
    ensure!(parts.next().is_none(), "too many colons: use HOST:MACHINE[:ro]");
    let Some(target) = target else {
        ensure!(
            source.starts_with(b"/"),
            "no path in the machine: use HOST:MACHINE[:ro], NAME:MACHINE for a volume, or /PATH for an anonymous one"
        );
        check_target(source)?;
        return Ok(Mount::anonymous(source.to_vec()));
    };
    let mut access = Access::default();
    for option in options.split(|byte| *byte == b',').filter(|option| !option.is_empty()) {
        match option {
            b"ro" | b"readonly" => access.readonly = true,
            b"nocopy" => access.copies = false,
            b"U" => access.owned = true,
            // Labels and propagation of mounts of the host, which no machine sees.
            b"rw" | b"z" | b"Z" | b"copy" | b"cached" | b"delegated" | b"consistent" | b"private" | b"rprivate"
            | b"slave" | b"rslave" | b"shared" | b"rshared" | b"bind" | b"rbind" => {}
            other => match other.strip_prefix(b"cache=") {
                Some(mode) => access.cache = cache(mode)?,
                None => {
                    bail!("unknown option {:?}: use ro, rw, nocopy, U or cache=MODE", String::from_utf8_lossy(other))
                }
            },
        }
    }
    access.check()?;
    bind_or_volume(source, target, access, true)
}

fn bind_or_volume(source: &[u8], target: &[u8], access: Access, creates: bool) -> Result<Mount> {
    check_target(target)?;
    ensure!(!source.is_empty(), "no source: use HOST:MACHINE[:ro]");
    let target = target.to_vec();
    if matches!(source, [b'/' | b'.', ..]) {
        return Ok(Mount { source: Source::Bind { path: path(source).to_owned(), creates }, target, access });
    }
    let name = String::from_utf8_lossy(source).into_owned();
    volumes::check_name(&name)?;
    Ok(Mount { source: Source::Volume(Some(name)), target, access })
}

fn cache(mode: &[u8]) -> Result<ShareCache> {
    String::from_utf8_lossy(mode).parse().map_err(anyhow::Error::msg)
}

fn check_target(target: &[u8]) -> Result<()> {
    let path = path(target);
    let climbs = path.components().any(|part| part == Component::ParentDir);
    ensure!(
        path.is_absolute() && path.parent().is_some() && !climbs && !target.contains(&0),
        "{} is not a mount point: use an absolute path in the machine, other than / and without `..`",
        path.display()
    );
    Ok(())
}

/// Parses `KEY=VALUE,...`.
fn parse_mount(word: &OsString) -> Result<Mount> {
    let (mut kind, mut source, mut target, mut access) = (&b"volume"[..], None, None, Access::default());
    let mut options = Vec::new();
    for part in word.as_bytes().split(|byte| *byte == b',') {
        let at = part.iter().position(|byte| *byte == b'=').unwrap_or(part.len());
        let (key, value) = (part.get(..at).unwrap_or_default(), part.get(at + 1..));
        let is_on = || match value {
            None | Some(b"true" | b"1") => Ok(true),
            Some(b"false" | b"0") => Ok(false),
            Some(_) => bail!("{}: use true or false", String::from_utf8_lossy(part)),
        };
        match (key, value) {
            (b"type", Some(value)) => kind = value,
            (b"source" | b"src", Some(value)) => source = Some(value),
            (b"target" | b"dst" | b"destination", Some(value)) => target = Some(value),
            (b"readonly" | b"ro", _) => access.readonly = is_on()?,
            (b"volume-nocopy", _) => access.copies = !is_on()?,
            (b"U" | b"chown", _) => access.owned = is_on()?,
            (b"cache", Some(mode)) => access.cache = cache(mode)?,
            (b"tmpfs-size", Some(value)) => options.push(format!("size={}", String::from_utf8_lossy(value))),
            (b"tmpfs-mode", Some(value)) => options.push(format!("mode={}", String::from_utf8_lossy(value))),
            (b"bind-propagation" | b"consistency" | b"relabel" | b"bind-recursive", _) => {}
            (key, _) => bail!("unknown key {:?}: use type, source, target or readonly", String::from_utf8_lossy(key)),
        }
    }
    let target = target.context("no target: use target=PATH")?;
    check_target(target)?;
    access.check()?;
    match (kind, source) {
        (b"bind", source) => {
            // A relative path is one here, without any dot.
            let path = path(source.context("no source: use source=PATH")?).to_owned();
            Ok(Mount { source: Source::Bind { path, creates: false }, target: target.to_vec(), access })
        }
        (b"volume", None) => Ok(Mount { access, ..Mount::anonymous(target.to_vec()) }),
        (b"volume", Some(source)) => {
            ensure!(!matches!(source, [b'/' | b'.', ..]), "a volume has a name: use type=bind for a path");
            bind_or_volume(source, target, access, false)
        }
        (b"tmpfs", _) => {
            options.extend(access.readonly.then(|| "ro".to_owned()));
            let text = format!("{}:{}", String::from_utf8_lossy(target), options.join(","));
            let tmpfs = process::tmpfs(&text).map_err(anyhow::Error::msg)?;
            Ok(Mount { source: Source::Tmpfs(tmpfs), target: target.to_vec(), access })
        }
        (other, _) => bail!("unknown type {:?}: use bind, volume or tmpfs", String::from_utf8_lossy(other)),
    }
}

#[cfg(test)]
mod tests;
