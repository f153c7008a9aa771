//! The store's index of images and names: a single file that is replaced atomically.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::config::ImageProcess;
use super::digest::Digest;

/// Incremented when older versions of husk cannot read it.
const VERSION: u32 = 1;

/// The content of the index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    version: u32,
    /// By digest.
    pub images: BTreeMap<Digest, Record>,
    /// By full name.
    pub names: BTreeMap<String, Digest>,
    /// Images by the identity of the files and directories that they were made from.
    pub files: BTreeMap<String, Digest>,
}

/// The record of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The key of its root file system.
    pub root: Digest,
    /// Its process configuration.
    pub process: ImageProcess,
    /// Its architecture.
    pub architecture: String,
    /// Its creation time, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// When it was added, in seconds since 1970.
    pub added_seconds: u64,
    /// The path that it was loaded from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The names in its archive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own_names: Vec<String>,
    /// Its layers, lowest first.
    pub layers: Vec<LayerRecord>,
    /// The uncompressed size of its layers.
    pub unpacked_bytes: u64,
}

/// The record of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of its uncompressed content.
    pub diff_id: Digest,
    /// The digest of its compressed blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<Digest>,
    /// The size of its files, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_bytes: Option<u64>,
}

impl LayerRecord {
    /// A layer whose files have not been measured.
    pub fn new(diff_id: Digest, blob: Option<Digest>) -> LayerRecord {
        LayerRecord { diff_id, blob, files_bytes: None }
    }
}

impl Record {
    /// Merges the record of the same image from another source: its layers may already be here, and its size is the
    /// same.
    fn keep_what_is_known(&mut self, known: &Record) {
        if self.layers.len() == known.layers.len() {
            for (layer, known) in self.layers.iter_mut().zip(&known.layers) {
                layer.blob = layer.blob.or(known.blob);
                layer.files_bytes = layer.files_bytes.or(known.files_bytes);
            }
        }
        self.unpacked_bytes = self.unpacked_bytes.max(known.unpacked_bytes);
        self.source = self.source.take().or_else(|| known.source.clone());
    }
}

impl Default for Index {
    fn default() -> Index {
        Index { version: VERSION, images: BTreeMap::new(), names: BTreeMap::new(), files: BTreeMap::new() }
    }
}

impl Index {
    /// Parses the index file.
    pub fn parse(json: &[u8]) -> Result<Index> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(json).context("it is corrupted")?;
        ensure!(version == VERSION, "it has format version {version}, and this husk supports version {VERSION}");
        serde_json::from_slice(json).context("it is corrupted")
    }

    /// Serializes the index file.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// The only image whose digest has this prefix.
    pub fn by_prefix(&self, hex: &str) -> Option<Digest> {
        let mut found = self.images.keys().filter(|id| id.hex().starts_with(hex));
        found.next().copied().filter(|_| found.next().is_none())
    }

    /// The names of an image.
    pub fn names_of(&self, id: Digest) -> Vec<&str> {
        self.names.iter().filter(|&(_, &named)| named == id).map(|(name, _)| name.as_str()).collect()
    }

    /// Adds an image. An unnamed image of an older state of the same path is removed, unless it `is_used`.
    pub fn add(&mut self, id: Digest, mut record: Record, file: Option<String>, is_used: &dyn Fn(Digest) -> bool) {
        if let Some(known) = self.images.get(&id) {
            record.keep_what_is_known(known);
        }
        self.measure(&mut record);
        if record.source.is_some() {
            let old = self.images.iter().filter(|&(&old, found)| found.source == record.source && old != id);
            let old: Vec<Digest> = old.map(|(&old, _)| old).collect();
            for old in old {
                if self.names_of(old).is_empty() && !is_used(old) {
                    self.remove(old);
                }
            }
        }
        self.images.insert(id, record);
        if let Some(file) = file {
            self.files.insert(file, id);
        }
    }

    /// Notes the sizes of layers that another image has as well.
    fn measure(&self, record: &mut Record) {
        let known = |diff_id| {
            let mut layers = self.images.values().flat_map(|image| &image.layers);
            layers.find_map(|layer| layer.files_bytes.filter(|_| layer.diff_id == diff_id))
        };
        for layer in record.layers.iter_mut().filter(|layer| layer.files_bytes.is_none()) {
            layer.files_bytes = known(layer.diff_id);
        }
    }

    /// Removes an image and all references to it.
    pub fn remove(&mut self, id: Digest) {
        self.images.remove(&id);
        self.names.retain(|_, named| *named != id);
        self.files.retain(|_, made| *made != id);
    }
}
