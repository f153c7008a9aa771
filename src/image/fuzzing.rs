//! Entry points for fuzzing each parser of untrusted input, without a store: for `fuzz/`.

use std::io::{Seek, SeekFrom};

use anyhow::Result;

use super::config::ImageConfig;
use super::erofs::{Form, Writer};
use super::layer::{self, Whiteouts};
use super::manifest::{self, Manifest, Platform};
use super::outside;
use super::reference::Reference;
use super::registry::{self, Challenge};
use super::tar::Stream;
use super::tree::{Tree, TreeLimits};
use super::unpack;
use crate::sys;

/// Merges two layers and creates an image of them in memory. Returns its size.
pub fn layers(lower: &[u8], upper: &[u8], form: Form) -> Result<u64> {
    let mut tree = Tree::new(TreeLimits { entries: 10_000, memory_bytes: 16 << 20 });
    let mut writer = Writer::new(sys::memory_file(c"image")?, sys::memory_file(c"spill")?, form);
    for bytes in [lower, upper] {
        let unpacked = unpack::unpacked(std::io::Cursor::new(bytes.to_vec()))?;
        let limited = std::io::Read::take(unpacked, 4 << 20);
        layer::apply(Stream(limited), Whiteouts::Apply, &mut tree, &mut writer)?;
    }
    let mut image = writer.finish(&tree, [0; 16])?;
    Ok(image.seek(SeekFrom::End(0))?)
}

/// Parses a manifest or index and selects an image; parses a configuration and a registry's challenge.
pub fn json(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Challenge::parse(text);
    }
    if let Ok(Manifest::Index(manifests)) = Manifest::parse(bytes) {
        // The first suitable one, or an error.
        let _ = manifest::choose(&manifests, &Platform::default()).map(|chosen| chosen.size);
    }
    if let Ok(config) = ImageConfig::parse(bytes) {
        let _ = config.check_platform();
    }
    // Questions of processes that were taken over.
    let _ = serde_json::from_slice::<outside::Question>(bytes);
    if let Ok(registry::Question::WantsLayers(documents)) = serde_json::from_slice(bytes) {
        registry::find_in(&documents);
    }
}

/// Looks up credentials in a file of Docker or podman.
pub fn credentials(json: &[u8]) {
    for name in ["alpine", "registry.example/team/app"] {
        if let Ok(reference) = name.parse::<Reference>() {
            registry::parse_credentials(json, &reference);
        }
    }
}
