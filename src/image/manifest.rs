//! From the JSON of an OCI index or manifest (and Docker's, which differ in their media types only) to what they name.

use anyhow::{Context, Result, ensure};
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
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DescribedPlatform {
    /// Go's word for the processor.
    #[serde(default)]
    pub architecture: String,
    /// Go's word for the kernel.
    #[serde(default)]
    pub os: String,
}

/// The processor and the kernel of an image that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Go's word for the processor.
    pub architecture: String,
    /// Go's word for the kernel.
    pub os: String,
}

impl Default for Platform {
    fn default() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into() }
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
            ensure!(file.config.is_none() && file.layers.is_none(), "a manifest that is an index as well");
            ensure!(manifests.len() <= MAX_MANIFESTS, "an index of {} images", manifests.len());
            return Ok(Manifest::Index(manifests));
        }
        let config = file.config.context("a manifest of version 1, or of no image")?;
        let layers = file.layers.unwrap_or_default();
        ensure!(layers.len() <= MAX_LAYERS, "the image has {} layers, {MAX_LAYERS} are the most", layers.len());
        Ok(Manifest::Image { config, layers })
    }
}

/// The image for a platform: the one that says so, or the only one, if it does not say.
pub fn choose<'a>(manifests: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let is_ours = |found: &DescribedPlatform| found.architecture == platform.architecture && found.os == platform.os;
    if let Some(found) = manifests.iter().find(|found| found.platform.as_ref().is_some_and(is_ours)) {
        return Ok(found);
    }
    match manifests {
        [only] if only.platform.is_none() => Ok(only),
        _ => {
            let platforms = manifests.iter().filter_map(|found| found.platform.as_ref());
            let mut names: Vec<String> =
                platforms.map(|found| format!("{}/{}", found.os, found.architecture)).take(20).collect();
            names.retain(|name| name != "unknown/unknown");
            let Platform { architecture, os } = platform;
            anyhow::bail!("no image for {os}/{architecture} in it (there are: {})", names.join(", "))
        }
    }
}
