//! OCI image layouts (image-layout.md), as directories or archives.

use anyhow::{Context, Result, bail, ensure};

use super::bundle::{Bundle, Part, read_json};
use super::config::ImageConfig;
use super::digest::Digest;
use super::import::Scope;
use super::manifest::{self, Descriptor, MAX_INDEX_DEPTH, Manifest, Platform};
use super::reference::same_name;
use super::{Image, Layer};

/// The list of images in a layout.
pub const INDEX: &str = "index.json";
/// The marker file of a layout.
pub const MARK: &str = "oci-layout";
/// The annotation with an image's name.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation with the full name, if the other one is only a tag (containerd, and Docker since 25).
pub const FULL_NAME: &str = "io.containerd.image.name";

/// The image that `scope` chooses.
pub fn image(bundle: &Bundle<'_>, scope: Scope<'_>, platform: &Platform) -> Result<Image> {
    let Manifest::Index(manifests) = Manifest::parse(&read_json(bundle.part(INDEX)?)?)? else {
        bail!("{INDEX} is not an index");
    };
    let all = manifests.iter().filter(|found| found.may_be_an_image());
    let mut beside: Vec<String> = all.clone().filter_map(|found| names_of(found).into_iter().next()).collect();
    beside.dedup();
    let wanted = match scope {
        Scope::Only => None,
        Scope::Named(name) => Some(name),
        // Without several names there are at most several platforms, of which one is chosen.
        Scope::Nth(_) if beside.len() <= 1 => None,
        Scope::Nth(nth) => Some(beside.get(nth).context("it has fewer images")?.as_str()),
    };
    let named: Vec<&Descriptor> = all.filter(|found| wanted.is_none_or(|wanted| is_named(found, wanted))).collect();
    if let Some(wanted) = wanted {
        ensure!(!named.is_empty(), "it has no image {wanted:?}{}", listed(&manifests));
    }
    let is_several = || format!("it has {} images{}", named.len(), listed(&manifests));
    let images = match &named[..] {
        // Its configuration specifies the platform.
        [only] => vec![*only],
        _ => suited(bundle, &named, platform).with_context(is_several)?,
    };
    let mut found = images.first().copied().context("it contains no image")?.clone();
    // Two equally suited images are distinct if they have names.
    let is_it = |other: &&Descriptor| other.digest == found.digest || names_of(other).is_empty();
    ensure!(wanted.is_some() || images.iter().all(is_it), is_several());
    let names = names_of(&found);
    for _ in 0..MAX_INDEX_DEPTH {
        match Manifest::parse(&verified(bundle, &found)?)? {
            Manifest::Index(manifests) => {
                let all: Vec<&Descriptor> = manifests.iter().collect();
                found = suited(bundle, &all, platform)?.first().copied().context("it contains no image")?.clone();
            }
            Manifest::Image { config, layers } => return of_manifest(bundle, &config, &layers, names, beside),
        }
    }
    bail!("indexes are nested more than {MAX_INDEX_DEPTH} levels deep")
}

/// The suitable images for a platform that are present: an index may refer to more.
fn suited<'a>(bundle: &Bundle<'_>, images: &[&'a Descriptor], platform: &Platform) -> Result<Vec<&'a Descriptor>> {
    let is_here = |found: &&&Descriptor| bundle.has(&path_of(found));
    let here: Vec<&Descriptor> = images.iter().filter(is_here).copied().collect();
    let suited = manifest::suited(&here, platform);
    if here.len() < images.len() { suited.context("some of its images are missing") } else { suited }
}

fn of_manifest(
    bundle: &Bundle<'_>,
    config: &Descriptor,
    layers: &[Descriptor],
    names: Vec<String>,
    beside: Vec<String>,
) -> Result<Image> {
    let json = verified(bundle, config)?;
    let config = ImageConfig::parse(&json)?;
    ensure!(
        config.diff_ids.len() == layers.len(),
        "its configuration has {} layers, its manifest has {}",
        config.diff_ids.len(),
        layers.len()
    );
    let layers = layers.iter().zip(&config.diff_ids).map(|(layer, &diff_id)| {
        Ok(Layer { part: blob(bundle, layer)?, blob: Some(layer.digest), diff_id: Some(diff_id) })
    });
    let config_json = String::from_utf8(json).context("read the image's configuration")?;
    let layers = layers.collect::<Result<_>>()?;
    Ok(Image { config, config_json, layers, names, beside })
}

/// The part of a descriptor, if it has the correct size.
fn blob(bundle: &Bundle<'_>, descriptor: &Descriptor) -> Result<Part> {
    let part = bundle.part(&path_of(descriptor))?;
    let (found, expected) = (part.size_bytes, descriptor.size);
    ensure!(found == expected, "{} has {found} bytes, expected {expected}", descriptor.digest);
    Ok(part)
}

/// The verified content of a manifest or a configuration.
fn verified(bundle: &Bundle<'_>, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let bytes = read_json(blob(bundle, descriptor)?)?;
    let found = Digest::of(&bytes);
    ensure!(found == descriptor.digest, "the digest of {} does not match: it is {found}", descriptor.digest);
    Ok(bytes)
}

fn path_of(descriptor: &Descriptor) -> String {
    format!("blobs/sha256/{}", descriptor.digest.hex())
}

fn names_of(found: &Descriptor) -> Vec<String> {
    let name = |key| found.annotations.as_ref()?.get(key);
    [FULL_NAME, REF_NAME].into_iter().find_map(name).cloned().into_iter().collect()
}

/// Whether it has this name, as a tag or as an image name: `app` is `docker.io/library/app:latest`.
fn is_named(found: &Descriptor, wanted: &str) -> bool {
    let name = |key| found.annotations.as_ref()?.get(key);
    [FULL_NAME, REF_NAME].into_iter().filter_map(name).any(|name| same_name(name, wanted))
}

/// The names in a layout, for an error message.
fn listed(manifests: &[Descriptor]) -> String {
    let names: Vec<String> = manifests.iter().flat_map(names_of).take(20).collect();
    if names.is_empty() { String::new() } else { format!(": choose one with oci:PATH:NAME ({})", names.join(", ")) }
}
