//! Parses image names into registry, repository, and tag or digest.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};

use super::digest::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
/// The prefix of names without a `/` in that registry.
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// The maximum length of the full name without tag or digest.
const MAX_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;
/// `@sha256:` and its digits.
const DIGEST_BYTES: usize = 72;

/// The full name of an image: `docker.io/library/debian:latest`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// `HOST[:PORT]`.
    pub registry: String,
    /// Path components separated by `/`.
    pub repository: String,
    /// The tag or digest.
    pub version: Version,
}

/// Selects an image in a repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// The current image with this tag.
    Tag(String),
    /// The image with this digest.
    Digest(Digest),
}

impl Reference {
    /// The registry itself: a reference with an empty repository, for its credentials.
    pub fn of_registry(host: &str) -> Result<Reference> {
        ensure!(is_registry(host), "invalid registry host {host:?}");
        let registry = if host == "index.docker.io" { DEFAULT_REGISTRY } else { host };
        let version = Version::Tag(DEFAULT_TAG.to_owned());
        Ok(Reference { registry: registry.to_owned(), repository: String::new(), version })
    }

    /// The reference for requests to the registry.
    pub fn version(&self) -> String {
        match &self.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(digest) => digest.to_string(),
        }
    }

    /// The shortest form of the name.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        // A repository may be named like another registry.
        let short = full.strip_prefix("docker.io/").filter(|rest| split_registry(rest).is_none()).unwrap_or(&full);
        // Only a name with a single component gets the prefix when it is parsed, so only there can it be left out.
        short.strip_prefix(OFFICIAL).filter(|rest| !rest.contains('/')).unwrap_or(short).to_owned()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    /// Parses `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`. As in Docker, the first component is a host if it contains a `.` or
    /// a `:`, or is `localhost`; and a digest takes precedence over a tag.
    fn from_str(text: &str) -> Result<Reference> {
        parse(text).with_context(|| format!("invalid image name {:?}", text.chars().take(100).collect::<String>()))
    }
}

/// Whether two words are the same image name, or equal.
pub fn same_name(a: &str, b: &str) -> bool {
    match (a.parse::<Reference>(), b.parse::<Reference>()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// The registry at the start of a name, and the rest, if it starts with one.
fn split_registry(name: &str) -> Option<(&str, &str)> {
    name.split_once('/').filter(|(first, _)| *first == "localhost" || first.contains(['.', ':']))
}

fn parse(text: &str) -> Result<Reference> {
    ensure!(text.len() <= MAX_BYTES + 1 + MAX_TAG_BYTES + DIGEST_BYTES, "it is too long");
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>()?)),
        None => (text, None),
    };
    let (registry, rest) = split_registry(name).unwrap_or((DEFAULT_REGISTRY, name));
    let (repository, tag) = match rest.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    ensure!(is_registry(registry), "invalid registry host {registry:?}");
    ensure!(
        repository.split('/').all(is_path_component),
        "names consist of lowercase letters and digits, with . _ - in between"
    );
    ensure!(tag.is_none_or(is_tag), "invalid tag {:?}", tag.unwrap_or_default());
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
    let repository = if official { format!("{OFFICIAL}{repository}") } else { repository.to_owned() };
    ensure!(registry.len() + 1 + repository.len() <= MAX_BYTES, "it is too long");
    let version = match digest {
        Some(digest) => Version::Digest(digest),
        None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
    };
    Ok(Reference { registry: registry.to_owned(), repository, version })
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(is_label) && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Lowercase letters and digits, separated by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut bytes = text.bytes();
    let (Some(first), last) = (bytes.next(), text.bytes().next_back()) else { return false };
    let separators = text.split(|c: char| c.is_ascii() && is_alphanumeric(c as u8));
    is_alphanumeric(first)
        && last.is_some_and(is_alphanumeric)
        && separators
            .filter(|separator| !separator.is_empty())
            .all(|separator| matches!(separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'))
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=MAX_TAG_BYTES).contains(&text.len())
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_completed_like_dockers() {
        for (typed, full, familiar) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("grafana/loki", "docker.io/grafana/loki:latest", "grafana/loki:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("library/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("localhost:5000/a/b__c:1.0-x", "localhost:5000/a/b__c:1.0-x", "localhost:5000/a/b__c:1.0-x"),
            // Not an image of that registry.
            ("docker.io/quay.io/a", "docker.io/quay.io/a:latest", "docker.io/quay.io/a:latest"),
            ("docker.io/localhost/a", "docker.io/localhost/a:latest", "docker.io/localhost/a:latest"),
            ("quay.io/a/b-----c", "quay.io/a/b-----c:latest", "quay.io/a/b-----c:latest"),
        ] {
            let reference: Reference = typed.parse().unwrap();
            assert_eq!((reference.to_string().as_str(), reference.familiar().as_str()), (full, familiar));
            for name in [reference.to_string(), reference.familiar()] {
                assert_eq!(name.parse::<Reference>().unwrap(), reference);
            }
        }
        let digest = Digest::of(b"");
        let both: Reference = format!("debian:12@{digest}").parse().unwrap();
        assert_eq!(both.to_string(), format!("docker.io/library/debian@{digest}"));
    }

    #[test]
    fn an_invalid_name_is_rejected() {
        for text in [
            "",
            "/",
            "a/",
            "/a",
            "Debian",
            "a//b",
            "a..b",
            "a___b",
            "a._b",
            "-a",
            "a-",
            "a:",
            "a:-x",
            "a@sha256:12",
            "a@",
            "é",
            "a:b:c",
            "host:0/a",
            "host:99999/a",
            "host:/a",
            "-h.io/a",
            "h..io/a",
            "a b",
            "../a",
            "a/../b",
            "a:ü",
            "user@host/x",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
        assert!("a".repeat(300).parse::<Reference>().is_err());
        // Its full name would be too long.
        assert!("a".repeat(250).parse::<Reference>().is_err());
        assert!(format!("a:{}", "b".repeat(129)).parse::<Reference>().is_err());
    }
}
