//! Parses OCI manifests and indexes, and Docker's, which differ only in media types.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::config::MAX_LAYERS;
use super::digest::Digest;

/// Nested indexes are allowed, but deeper nesting does not occur in practice.
pub const MAX_INDEX_DEPTH: usize = 4;
/// One for each platform, and as many attestations.
const MAX_MANIFESTS: usize = 4096;

/// A descriptor of content: digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type.
    #[serde(default)]
    pub media_type: String,
    /// The digest.
    pub digest: Digest,
    /// The size in bytes.
    pub size: u64,
    /// The platform, for an image in an index.
    pub platform: Option<DescribedPlatform>,
    /// Annotations, such as names.
    #[serde(default)]
    pub annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// The platform of an image in an index.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescribedPlatform {
    /// The architecture in Go's terms.
    #[serde(default)]
    pub architecture: String,
    /// The operating system in Go's terms.
    #[serde(default)]
    pub os: String,
    /// The required variant of the architecture.
    pub variant: Option<String>,
}

impl fmt::Display for DescribedPlatform {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().filter(|variant| !variant.is_empty()).try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// The platform of the wanted image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// The architecture in Go's terms.
    pub architecture: String,
    /// The operating system in Go's terms.
    pub os: String,
    /// The highest supported x86-64 level of the psABI, 1 to 4.
    pub level: u8,
}

impl Default for Platform {
    fn default() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into(), level: this_level() }
    }
}

/// The level of this host's processor, which limits that of machines.
fn this_level() -> u8 {
    macro_rules! has {
        ($($feature:tt)*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    }
    match () {
        () if !has!("cmpxchg16b" "popcnt" "sse3" "sse4.1" "sse4.2" "ssse3") => 1,
        () if !has!("avx" "avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "movbe") => 2,
        () if !has!("avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl") => 3,
        () => 4,
    }
}

impl Platform {
    /// How well an image is suited: lower is better. As in Docker, images for any processor are preferred to those for
    /// a newer one, which are allowed if the processor supports them. `None` if it cannot run.
    fn rank(&self, found: &DescribedPlatform) -> Option<u8> {
        if found.architecture != self.architecture || found.os != self.os {
            return None;
        }
        match found.variant.as_deref().unwrap_or_default() {
            "" | "v1" => Some(0),
            variant => {
                let level: u8 = variant.strip_prefix('v')?.parse().ok()?;
                (self.architecture == "amd64" && (2..=self.level).contains(&level)).then(|| u8::MAX - level)
            }
        }
    }
}

/// A parsed manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// An image: its configuration and layers, lowest first.
    Image {
        /// The configuration.
        config: Descriptor,
        /// The layers.
        layers: Vec<Descriptor>,
    },
    /// An index of several images.
    Index(Vec<Descriptor>),
}

#[derive(Deserialize)]
struct File {
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// Parses a manifest or an index.
    pub fn parse(json: &[u8]) -> Result<Manifest> {
        let file: File = serde_json::from_slice(json).context("read the image's manifest")?;
        if let Some(manifests) = file.manifests {
            // Otherwise different clients could interpret the same file as different images.
            ensure!(file.config.is_none() && file.layers.is_none(), "the manifest is also an index");
            ensure!(manifests.len() <= MAX_MANIFESTS, "the index has too many images: {}", manifests.len());
            return Ok(Manifest::Index(manifests));
        }
        let config = file.config.context("unsupported manifest: it has schema version 1, or is not an image")?;
        let layers = file.layers.unwrap_or_default();
        ensure!(layers.len() <= MAX_LAYERS, "the image has {} layers, the maximum is {MAX_LAYERS}", layers.len());
        Ok(Manifest::Image { config, layers })
    }
}

/// The media types of image manifests and indexes, by OCI and Docker.
const IMAGE_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// The annotation of attestations by Docker's builder.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// The maximum number of platforms in an error message.
const MAX_SHOWN: usize = 20;

impl Descriptor {
    /// Whether it may be an image: not an attestation, and not of a custom media type (image-index.md).
    pub fn may_be_an_image(&self) -> bool {
        let is_attestation = self.annotations.as_ref().is_some_and(|found| found.contains_key(REFERENCE_TYPE));
        let is_unknown =
            self.platform.as_ref().is_some_and(|found| found.os == "unknown" || found.architecture == "unknown");
        let is_known_type = self.media_type.is_empty() || IMAGE_TYPES.contains(&self.media_type.as_str());
        is_known_type && !is_attestation && !is_unknown
    }
}

/// The images that suit a platform equally well; those with a platform, or else the only one without. At least one.
pub fn suited<'a>(images: &[&'a Descriptor], platform: &Platform) -> Result<Vec<&'a Descriptor>> {
    let images: Vec<&Descriptor> = images.iter().copied().filter(|found| found.may_be_an_image()).collect();
    let rank = |found: &Descriptor| found.platform.as_ref().and_then(|found| platform.rank(found));
    if let Some(best) = images.iter().filter_map(|found| rank(found)).min() {
        return Ok(images.into_iter().filter(|found| rank(found) == Some(best)).collect());
    }
    let silent: Vec<&Descriptor> = images.iter().copied().filter(|found| found.platform.is_none()).collect();
    if let Some(first) = silent.first()
        && silent.iter().all(|found| found.digest == first.digest)
    {
        return Ok(silent);
    }
    let names = images.iter().filter_map(|found| found.platform.as_ref()).take(MAX_SHOWN).map(ToString::to_string);
    let names: Vec<String> = names.collect();
    let Platform { architecture, os, .. } = platform;
    match silent.len() {
        0 => bail!("no image for {os}/{architecture} that this CPU can run (available: {})", names.join(", ")),
        count => bail!("{count} images without a platform"),
    }
}

/// Selects the image for a platform from an index.
pub fn choose<'a>(manifests: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let all: Vec<&Descriptor> = manifests.iter().collect();
    suited(&all, platform)?.first().copied().context("the index contains no images")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A descriptor with a digest derived from `name`, for a platform such as `linux/amd64/v3`.
    fn image(name: &str, platform: Option<&str>) -> Descriptor {
        let platform = platform.map(|platform| {
            let mut words = platform.split('/').map(str::to_owned);
            let (os, architecture) = (words.next().unwrap(), words.next().unwrap());
            DescribedPlatform { os, architecture, variant: words.next() }
        });
        let digest = Digest::of(name.as_bytes());
        Descriptor { media_type: String::new(), digest, size: 1, platform, annotations: None }
    }

    fn attestation(platform: Option<&str>) -> Descriptor {
        let annotations = [(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned())];
        Descriptor { annotations: Some(annotations.into()), ..image("attestation", platform) }
    }

    fn chosen(images: &[Descriptor], level: u8) -> Result<Digest> {
        choose(images, &Platform { level, ..Platform::default() }).map(|found| found.digest)
    }

    #[test]
    fn a_variant_is_chosen_if_the_processor_supports_it() {
        let all =
            ["linux/arm64", "linux/amd64/v4", "linux/amd64/v3", "linux/amd64/v2", "linux/amd64/x", "windows/amd64"];
        let mut images: Vec<Descriptor> = all.iter().map(|platform| image(platform, Some(platform))).collect();
        for (level, expected) in [(2, "linux/amd64/v2"), (3, "linux/amd64/v3"), (4, "linux/amd64/v4")] {
            assert_eq!(chosen(&images, level).unwrap(), Digest::of(expected.as_bytes()), "{level}");
        }
        let error = chosen(&images, 1).unwrap_err().to_string();
        assert!(error.contains("no image for linux/amd64 that this CPU can run"), "{error}");
        assert!(error.contains("linux/amd64/v2, linux/amd64/x, windows/amd64"), "{error}");
        for plain in ["linux/amd64", "linux/amd64/v1"] {
            images.push(image(plain, Some(plain)));
            assert_eq!(chosen(&images, 4).unwrap(), Digest::of(plain.as_bytes()), "Docker takes the plain one");
            images.pop();
        }
        assert!((1..=4).contains(&this_level()));
    }

    #[test]
    fn attestations_are_never_chosen() {
        for own in [None, Some("linux/amd64")] {
            for other in [None, Some("unknown/unknown"), Some("linux/amd64")] {
                let only = image("only", own);
                let images = [attestation(other), only.clone(), attestation(other)];
                assert_eq!(chosen(&images, 1).unwrap(), only.digest, "{own:?} {other:?}");
                assert!(chosen(&[attestation(other)], 1).is_err());
            }
        }
        let unmarked = image("attestation", Some("unknown/unknown"));
        assert_eq!(chosen(&[unmarked, image("only", None)], 1).unwrap(), Digest::of(b"only"));
        let other = Descriptor { media_type: "application/vnd.example+json".into(), ..image("other", None) };
        assert_eq!(chosen(&[other, image("only", None)], 1).unwrap(), Digest::of(b"only"));
    }

    #[test]
    fn an_image_without_a_platform_is_chosen_only_without_alternatives() {
        assert_eq!(chosen(&[image("arm", Some("linux/arm64")), image("x", None)], 1).unwrap(), Digest::of(b"x"));
        assert_eq!(chosen(&[image("x", None), image("x", None)], 1).unwrap(), Digest::of(b"x"));
        assert!(chosen(&[image("x", None), image("y", None)], 1).is_err());
        assert!(chosen(&[], 1).is_err());
    }
}
