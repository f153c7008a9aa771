//! From the word that a person types to what an image is made from, and from a path to what is found there.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

use super::bundle::{Bundle, Part};
use super::manifest::Platform;
use super::reference::Reference;
use super::{Image, docker_archive, oci_layout, unpack};

/// What an image is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file or a directory: an archive or layout of images, of which one may be named, a root file system's archive, or a
    /// root directory.
    Path {
        /// Where it is.
        path: PathBuf,
        /// Which of its images.
        image: Option<String>,
    },
    /// An image of the store, or of a registry; `typed` is the word itself, which may be a file's name too.
    Name {
        /// The full name.
        reference: Reference,
        /// As it was typed.
        typed: String,
    },
    /// An image of the store, by the first digits of its digest, of which there are at least twelve.
    Id(String),
}

/// As skopeo and podman have them.
const PREFIXES: [&str; 3] = ["docker-archive:", "oci-archive:", "oci:"];

impl FromStr for Source {
    type Err = Error;

    /// What begins with `/`, `.` or `~`, or could be no image's name, is a path. `docker-archive:PATH[:NAME]` and
    /// `oci:PATH[:NAME]` choose one of several images. Anything else is a name.
    fn from_str(word: &str) -> Result<Source> {
        ensure!(!word.is_empty(), "an image has a name or a path");
        for prefix in PREFIXES {
            if let Some(rest) = word.strip_prefix(prefix) {
                let (path, image) = match rest.split_once(':') {
                    Some((path, image)) => (path, Some(image.to_owned())),
                    None => (rest, None),
                };
                ensure!(!path.is_empty(), "{prefix} needs a path");
                return Ok(Source::Path { path: path.into(), image });
            }
        }
        let hex = word.strip_prefix("sha256:").unwrap_or(word);
        if (12..=64).contains(&hex.len()) && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Source::Id(hex.to_owned()));
        }
        match word.parse() {
            Ok(reference) if !word.starts_with(['/', '.', '~']) => {
                Ok(Source::Name { reference, typed: word.to_owned() })
            }
            _ => Ok(Source::Path { path: word.into(), image: None }),
        }
    }
}

/// What a path turned out to be.
pub(super) enum Found {
    /// Layers and a configuration.
    Image(Box<Image>),
    /// A root file system's tar archive, maybe packed.
    RootArchive(Part),
    /// A root directory.
    RootDirectory(PathBuf),
}

/// Looks at what is at `path`. An image's archive that is packed is unpacked to the file that `spool` makes.
pub(super) fn look(
    path: &Path,
    image: Option<&str>,
    platform: &Platform,
    spool: &dyn Fn(&mut dyn Read) -> Result<File>,
) -> Result<Found> {
    // A pipe that nobody writes to would else be waited for.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        if !path.join("oci-layout").exists() && !path.join(oci_layout::INDEX).exists() {
            return Ok(Found::RootDirectory(fs::canonicalize(path)?));
        }
        return oci_layout::image(&Bundle::Directory(path.to_owned()), image, platform).map(Box::new).map(Found::Image);
    }
    ensure!(kind.is_file(), "it is neither a file nor a directory");
    let whole = Part::whole(file)?;
    ensure!(whole.size_bytes > 0, "it is empty");
    let mut start = Vec::new();
    whole.clone().take(512).read_to_end(&mut start)?;
    let bundle = match unpack::compression(&start) {
        None => Bundle::in_archive(whole.clone())?,
        Some(_) if !holds_an_image(&whole)? => None,
        Some(_) => Bundle::in_archive(Part::whole(spool(&mut unpack::unpacked(whole.clone())?)?)?)?,
    };
    let Some(bundle) = bundle else {
        ensure!(image.is_none(), "it is a root file system, and has no image of a name");
        return Ok(Found::RootArchive(whole));
    };
    // Docker's own list comes first: since docker 25, archives have both.
    if bundle.has(docker_archive::MANIFEST) {
        return docker_archive::image(&bundle, image).map(Box::new).map(Found::Image);
    }
    oci_layout::image(&bundle, image, platform).map(Box::new).map(Found::Image)
}

/// Whether the first entries of a packed archive are those of an image.
fn holds_an_image(packed: &Part) -> Result<bool> {
    Bundle::begins_like_an_image(unpack::unpacked(packed.clone())?)
}

/// Copies what is unpacked to `file`, which is not to be longer than `max_bytes`.
pub(super) fn spool_to(file: File, unpacked: &mut dyn Read, max_bytes: u64) -> Result<File> {
    let copied = io::copy(&mut unpacked.take(max_bytes), &mut &file).context("unpack it")?;
    if copied == max_bytes {
        bail!("it unpacks to more than the {} MiB that are free", max_bytes >> 20);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_path_or_a_name() {
        let path = |word: &str| Source::Path { path: word.into(), image: None };
        for word in ["/x", "./debian", "../x", ".", "Debian.tar", "x/", "a b", "~/x"] {
            assert_eq!(word.parse::<Source>().unwrap(), path(word));
        }
        for word in ["debian", "rootfs.tar", "localhost:5000/x:y", "a/b"] {
            let name = Source::Name { reference: word.parse().unwrap(), typed: word.into() };
            assert_eq!(word.parse::<Source>().unwrap(), name);
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
