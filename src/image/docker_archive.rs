//! Archives of `docker save`: `manifest.json` refers to a configuration and the layers' archives.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::bundle::{Bundle, read_json};
use super::config::ImageConfig;
use super::import::Scope;
use super::reference::same_name;
use super::{Image, Layer};

/// The list of images in an archive.
pub const MANIFEST: &str = "manifest.json";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ManifestEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    /// Go writes `null` for none.
    layers: Option<Vec<String>>,
}

/// Whether JSON is an image list in Docker's format.
pub fn is_list(json: &[u8]) -> bool {
    serde_json::from_slice::<Vec<ManifestEntry>>(json).is_ok_and(|entries| !entries.is_empty())
}

/// The image that `scope` chooses.
pub fn image(bundle: &Bundle<'_>, scope: Scope<'_>) -> Result<Image> {
    let entries: Vec<ManifestEntry> = bundle.json(MANIFEST)?;
    let entry = choose(&entries, scope)?;
    let json = bundle.part(&entry.config).and_then(read_json)?;
    let config = ImageConfig::parse(&json)?;
    let paths = entry.layers.as_deref().unwrap_or_default();
    ensure!(
        config.diff_ids.len() == paths.len(),
        "its configuration has {} layers, {MANIFEST} has {}",
        config.diff_ids.len(),
        paths.len()
    );
    let layers = paths.iter().zip(&config.diff_ids).map(|(path, &diff_id)| {
        // The compressed layer has no digest: its uncompressed content is verified.
        Ok(Layer { part: bundle.part(path)?, blob: None, diff_id: Some(diff_id) })
    });
    let config_json = String::from_utf8(json).context("read the image's configuration")?;
    let layers = layers.collect::<Result<_>>()?;
    Ok(Image { config, config_json, layers, names: names_of(entry), beside: entries.iter().map(name_of).collect() })
}

fn names_of(entry: &ManifestEntry) -> Vec<String> {
    entry.repo_tags.clone().unwrap_or_default()
}

/// A name for each image, if only its configuration.
fn name_of(entry: &ManifestEntry) -> String {
    names_of(entry).into_iter().next().unwrap_or_else(|| entry.config.clone())
}

fn choose<'a>(entries: &'a [ManifestEntry], scope: Scope<'_>) -> Result<&'a ManifestEntry> {
    match scope {
        Scope::Only => {
            let all: Vec<String> = entries.iter().flat_map(names_of).take(20).collect();
            let [only] = entries else {
                bail!("it has {} images: choose one with docker-archive:FILE:NAME ({})", entries.len(), all.join(", "));
            };
            Ok(only)
        }
        Scope::Nth(nth) => entries.get(nth).with_context(|| format!("it has {} images", entries.len())),
        Scope::Named(wanted) => {
            let is_wanted = |entry: &&ManifestEntry| names_of(entry).iter().any(|name| same_name(name, wanted));
            entries.iter().find(is_wanted).with_context(|| format!("it has no image {wanted:?}"))
        }
    }
}
