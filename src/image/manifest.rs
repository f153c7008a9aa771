//! From the JSON of an OCI index or manifest (and Docker's, which differ in their media types only) to what they name.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::config::MAX_LAYERS;
use super::digest::Digest;

/// Indexes of indexes are allowed, and nobody nests them deeper.
pub const MAX_INDEX_DEPTH: usize = 4;
/// One for each platform, and as many attestations.
const MAX_MANIFESTS: usize = 4096;

/// A content by its digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its content's name.
    pub digest: Digest,
    /// How many bytes it has.
    pub size: u64,
    /// What it runs on, if it is an image in an index.
    pub platform: Option<DescribedPlatform>,
    /// Names, among other things.
    #[serde(default)]
    pub annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// What an image in an index runs on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct DescribedPlatform {
    /// Go's word for the processor.
    #[serde(default)]
    pub architecture: String,
    /// Go's word for the kernel.
    #[serde(default)]
    pub os: String,
    /// What the processor has to have beyond the least of its kind.
    pub variant: Option<String>,
}

impl fmt::Display for DescribedPlatform {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().filter(|variant| !variant.is_empty()).try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// The processor and the kernel of an image that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Go's word for the processor.
    pub architecture: String,
    /// Go's word for the kernel.
    pub os: String,
    /// The highest level of x86-64 that the processor has, 1 to 4, as the psABI counts them.
    pub level: u8,
}

impl Default for Platform {
    fn default() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into(), level: this_level() }
    }
}

/// The level of this processor, of which a machine's has no more.
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
    /// How well an image suits: the lower, the better. As for Docker, what every processor runs comes before what takes a newer
    /// one, which comes here where this one is new enough. `None` if it cannot run.
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

/// What a manifest's bytes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// One image: its configuration and its layers, the lowest first.
    Image {
        /// Its configuration.
        config: Descriptor,
        /// Its layers.
        layers: Vec<Descriptor>,
    },
    /// Several images, of which one is to be chosen.
    Index(Vec<Descriptor>),
}

#[derive(Deserialize)]
struct File {
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// Reads the JSON of either.
    pub fn parse(json: &[u8]) -> Result<Manifest> {
        let file: File = serde_json::from_slice(json).context("read the image's manifest")?;
        if let Some(manifests) = file.manifests {
            // Else a client that believes one, and a client that believes the other, would see different images.
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

/// What an image's manifest and an index are called, by OCI and by Docker.
const IMAGE_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// What Docker's builder says of a manifest that speaks of another one.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// So many platforms stand in a message.
const MAX_SHOWN: usize = 20;

impl Descriptor {
    /// Whether it may be an image. What attests to one is none, nor is what has a media type of its own (image-index.md).
    pub fn may_be_an_image(&self) -> bool {
        let is_attestation = self.annotations.as_ref().is_some_and(|found| found.contains_key(REFERENCE_TYPE));
        let is_unknown =
            self.platform.as_ref().is_some_and(|found| found.os == "unknown" || found.architecture == "unknown");
        let is_known_type = self.media_type.is_empty() || IMAGE_TYPES.contains(&self.media_type.as_str());
        is_known_type && !is_attestation && !is_unknown
    }
}

/// The images for a platform, those that suit it equally well; those that say so, or the only one that does not say. There is one
/// at least.
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

/// The image for a platform, of all in an index.
pub fn choose<'a>(manifests: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let all: Vec<&Descriptor> = manifests.iter().collect();
    suited(&all, platform)?.first().copied().context("the index contains no images")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A descriptor whose digest is that of its name, for a platform such as `linux/amd64/v3`.
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
    fn a_variant_is_chosen_where_the_processor_has_it() {
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
    fn what_does_not_say_what_it_is_for_is_chosen_if_it_is_the_only_one() {
        assert_eq!(chosen(&[image("arm", Some("linux/arm64")), image("x", None)], 1).unwrap(), Digest::of(b"x"));
        assert_eq!(chosen(&[image("x", None), image("x", None)], 1).unwrap(), Digest::of(b"x"));
        assert!(chosen(&[image("x", None), image("y", None)], 1).is_err());
        assert!(chosen(&[], 1).is_err());
    }
}
