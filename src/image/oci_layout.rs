//! From an OCI image layout (image-layout.md), a directory or an archive of one, to an image.

use anyhow::{Context, Result, bail, ensure};

use super::bundle::{Bundle, Part, read_json};
use super::config::ImageConfig;
use super::digest::Digest;
use super::manifest::{self, Descriptor, MAX_INDEX_DEPTH, Manifest, Platform};
use super::{Image, Layer};

/// The list of a layout's images.
pub const INDEX: &str = "index.json";
/// The name of an image in it.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The whole name, where the other one is a tag alone (containerd, and docker since 25).
const FULL_NAME: &str = "io.containerd.image.name";

/// The image that has the name `wanted`, or the only one.
pub fn image(bundle: &Bundle, wanted: Option<&str>, platform: &Platform) -> Result<Image> {
    let Manifest::Index(manifests) = Manifest::parse(&read_json(bundle.part(INDEX)?)?)? else {
        bail!("{INDEX} is no index");
    };
    let mut found = match wanted {
        Some(wanted) => named(&manifests, wanted)?.clone(),
        None if manifests.len() == 1 => manifests.into_iter().next().context("no image")?,
        None => manifest::choose(&manifests, platform).with_context(|| several(&manifests))?.clone(),
    };
    let names = found.annotations.as_ref().map(name_of).unwrap_or_default();
    for _ in 0..MAX_INDEX_DEPTH {
        match Manifest::parse(&verified(bundle, &found)?)? {
            Manifest::Index(manifests) => found = manifest::choose(&manifests, platform)?.clone(),
            Manifest::Image { config, layers } => return of_manifest(bundle, &config, &layers, names),
        }
    }
    bail!("indexes within indexes, more than {MAX_INDEX_DEPTH} deep")
}

fn of_manifest(bundle: &Bundle, config: &Descriptor, layers: &[Descriptor], names: Vec<String>) -> Result<Image> {
    let id = config.digest;
    let config = ImageConfig::parse(&verified(bundle, config)?)?;
    ensure!(
        config.diff_ids.len() == layers.len(),
        "its configuration has {} layers, its manifest has {}",
        config.diff_ids.len(),
        layers.len()
    );
    let layers = layers.iter().zip(&config.diff_ids).map(|(layer, &diff_id)| {
        Ok(Layer { part: blob(bundle, layer)?, blob: Some(layer.digest), diff_id: Some(diff_id) })
    });
    Ok(Image { id, layers: layers.collect::<Result<_>>()?, config, names })
}

/// The part that a descriptor names, if it has the size that it says.
fn blob(bundle: &Bundle, descriptor: &Descriptor) -> Result<Part> {
    let part = bundle.part(&format!("blobs/sha256/{}", descriptor.digest.hex()))?;
    let (found, said) = (part.size_bytes, descriptor.size);
    ensure!(found == said, "{} has {found} bytes, not {said}", descriptor.digest);
    Ok(part)
}

/// The bytes of a manifest or a configuration.
fn verified(bundle: &Bundle, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let bytes = read_json(blob(bundle, descriptor)?)?;
    let found = Digest::of(&bytes);
    ensure!(found == descriptor.digest, "the digest of {} is {found}", descriptor.digest);
    Ok(bytes)
}

fn name_of(annotations: &std::collections::BTreeMap<String, String>) -> Vec<String> {
    [FULL_NAME, REF_NAME].iter().find_map(|&key| annotations.get(key)).cloned().into_iter().collect()
}

fn named<'a>(manifests: &'a [Descriptor], wanted: &str) -> Result<&'a Descriptor> {
    let is_wanted = |found: &&Descriptor| {
        found.annotations.as_ref().is_some_and(|annotations| {
            [FULL_NAME, REF_NAME].iter().any(|&key| annotations.get(key).is_some_and(|name| name == wanted))
        })
    };
    manifests.iter().find(is_wanted).with_context(|| format!("it has no image {wanted:?}"))
}

fn several(manifests: &[Descriptor]) -> String {
    let names: Vec<String> =
        manifests.iter().filter_map(|found| found.annotations.as_ref()).flat_map(name_of).take(20).collect();
    format!("it has {} images, type one as oci:PATH:NAME ({})", manifests.len(), names.join(", "))
}
