//! Parses image sources given by the user, and identifies the contents of paths.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

use super::bundle::{Bundle, List, Part};
use super::import::Scope;
use super::manifest::Platform;
use super::members::{self, Members};
use super::outside::Outside;
use super::reference::Reference;
use super::{Image, docker_archive, oci_layout, unpack};

/// The source of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file or a directory: image archive or layout, optionally with a name within it, root file system archive, or
    /// root directory.
    Path {
        /// The path.
        path: PathBuf,
        /// The name of one of its images.
        image: Option<String>,
    },
    /// An image in the store or a registry.
    Name {
        /// The full name.
        reference: Reference,
        /// For words with a slash: the file that takes precedence over a registry's image.
        path: Option<PathBuf>,
    },
    /// An image in the store, by at least twelve digits of its digest.
    Id(String),
}

/// The size of a tar archive's header, which is enough to recognize compressed data.
const HEADER_BYTES: usize = 512;
/// The prefixes used by skopeo and podman.
const PREFIXES: [&str; 3] = ["docker-archive:", "oci-archive:", "oci:"];

impl FromStr for Source {
    type Err = Error;

    /// Words that start with `/`, `.` or `~`, or that are not valid image names, are paths. `oci:PATH[:NAME]` and
    /// `docker-archive:PATH[:NAME]` select one of several images. Anything else is a name: a file in the working
    /// directory never shadows an image of the same name, unless the name contains a slash and the store has no such
    /// image.
    fn from_str(word: &str) -> Result<Source> {
        ensure!(!word.is_empty(), "the image name is empty");
        if PREFIXES.iter().any(|prefix| word.starts_with(prefix)) {
            return Source::at_path(word);
        }
        let hex = word.strip_prefix("sha256:").unwrap_or(word);
        if (12..=64).contains(&hex.len()) && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Source::Id(hex.to_owned()));
        }
        match word.parse() {
            Ok(reference) if !word.starts_with(['/', '.', '~']) => {
                Ok(Source::Name { reference, path: word.contains('/').then(|| word.into()) })
            }
            _ => Source::at_path(word),
        }
    }
}

impl Source {
    /// Parses a word that must be a path, optionally with a prefix.
    pub fn at_path(word: &str) -> Result<Source> {
        let Some((prefix, rest)) = PREFIXES.iter().find_map(|prefix| Some((prefix, word.strip_prefix(prefix)?))) else {
            return Ok(Source::Path { path: word.into(), image: None });
        };
        let (path, image) = match rest.split_once(':') {
            Some((path, image)) => (path, Some(image.to_owned())),
            None => (rest, None),
        };
        ensure!(!path.is_empty(), "{prefix} needs a path");
        Ok(Source::Path { path: path.into(), image })
    }
}

/// What an archive or a directory contains.
pub(super) enum Found {
    /// An image.
    Image(Box<Image>),
    /// A root file system's tar archive, possibly compressed.
    RootArchive(Part),
    /// A root directory.
    RootDirectory,
}

/// Identifies the contents of the directory that `outside` opens files of.
pub(super) fn look_in_directory(image: Scope<'_>, platform: &Platform, outside: &dyn Outside) -> Result<Found> {
    find(Bundle::Directory(outside), image, platform, Found::RootDirectory)
}

/// Identifies the contents of an open file. A compressed image archive is decompressed to a new file of `outside`, up to
/// `max_bytes`.
pub(super) fn look_into(
    file: File,
    image: Scope<'_>,
    platform: &Platform,
    max_bytes: u64,
    outside: &dyn Outside,
) -> Result<Found> {
    let whole = Part::whole(file)?;
    ensure!(whole.size_bytes > 0, "it is empty");
    let mut start = Vec::new();
    whole.clone().take(HEADER_BYTES as u64).read_to_end(&mut start)?;
    let compression = unpack::compression(&start);
    ensure!(compression.is_some() || start.len() == HEADER_BYTES, "it is not a tar archive");
    let unpacked = || unpack::unpacked(whole.clone());
    let members = match compression {
        None => Members::of(whole.clone())?,
        Some(_) if !members::may_hold_an_image(unpacked()?.take(max_bytes)) => None,
        Some(_) => Members::of(Part::whole(spool(outside.new_file()?, &mut unpacked()?, max_bytes)?)?)?,
    };
    let root = Found::RootArchive(whole);
    match members {
        Some(members) => find(Bundle::Archive(members), image, platform, root),
        None => find_root(root, image),
    }
}

/// The image in a bundle, or `root` if there is none.
fn find(bundle: Bundle<'_>, image: Scope<'_>, platform: &Platform, root: Found) -> Result<Found> {
    let found = match bundle.list() {
        Some(List::Docker) => docker_archive::image(&bundle, image)?,
        Some(List::Oci) => oci_layout::image(&bundle, image, platform)?,
        None => return find_root(root, image),
    };
    Ok(Found::Image(Box::new(found)))
}

fn find_root(root: Found, image: Scope<'_>) -> Result<Found> {
    ensure!(!matches!(image, Scope::Named(_)), "it is a root filesystem, which has no image names");
    Ok(root)
}

/// Copies decompressed data to `file`, up to `max_bytes`.
fn spool(file: File, unpacked: &mut dyn Read, max_bytes: u64) -> Result<File> {
    let copied = io::copy(&mut unpacked.take(max_bytes), &mut &file).context("unpack it")?;
    if copied == max_bytes {
        bail!("it unpacks to more than the {} MiB of free or allowed disk space", max_bytes >> 20);
    }
    Ok(file)
}

/// Returns `input` if it is a seekable file at its start, or otherwise a copy of its data in a new file.
pub(super) fn seekable(mut input: File, max_bytes: u64, new_file: &dyn Fn() -> Result<File>) -> Result<File> {
    let kind = input.metadata()?.file_type();
    ensure!(!kind.is_dir(), "it is a directory");
    if kind.is_file() && input.stream_position()? == 0 {
        return Ok(input);
    }
    let file = new_file()?;
    let copied = io::copy(&mut (&mut input).take(max_bytes), &mut &file).context("copy it to the image store")?;
    ensure!(copied < max_bytes, "it is larger than the {} MiB of free or allowed disk space", max_bytes >> 20);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_path_or_a_name() {
        let path = |word: &str| Source::Path { path: word.into(), image: None };
        for word in ["/x", "./debian", "../x", ".", "..", "./", ".x", "Debian.tar", "x/", "a b", "~/x"] {
            assert_eq!(word.parse::<Source>().unwrap(), path(word));
        }
        for word in ["debian", "debian:12", "rootfs.tar"] {
            let name = Source::Name { reference: word.parse().unwrap(), path: None };
            assert_eq!(word.parse::<Source>().unwrap(), name);
        }
        for word in ["localhost:5000/x:y", "a/b", "images/rootfs.tar"] {
            let name = Source::Name { reference: word.parse().unwrap(), path: Some(word.into()) };
            assert_eq!(word.parse::<Source>().unwrap(), name);
        }
        for word in ["debian:12", "0123456789ab", "x.tar"] {
            assert_eq!(Source::at_path(word).unwrap(), path(word));
        }
        assert_eq!("0123456789ab".parse::<Source>().unwrap(), Source::Id("0123456789ab".into()));
        assert_eq!(
            "docker-archive:x.tar:debian:12".parse::<Source>().unwrap(),
            Source::Path { path: "x.tar".into(), image: Some("debian:12".into()) }
        );
        assert_eq!("oci:d".parse::<Source>().unwrap(), path("d"));
        assert!("".parse::<Source>().is_err() && "oci:".parse::<Source>().is_err());
    }
}
