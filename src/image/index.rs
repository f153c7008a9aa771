//! From names to images: what the store remembers, in one file that is replaced as a whole.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::config::ImageProcess;
use super::digest::Digest;

/// Changes when an older husk could not read it.
const VERSION: u32 = 1;

/// Everything the store knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    version: u32,
    /// By their own digests.
    pub images: BTreeMap<Digest, Record>,
    /// Full names, and the images that have them.
    pub names: BTreeMap<String, Digest>,
    /// Files and directories that did not change since, and the images made from them.
    pub files: BTreeMap<String, Digest>,
}

/// What the store knows of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The key of its root.
    pub root: Digest,
    /// What it is to run.
    pub process: ImageProcess,
    /// The processor it is for.
    pub architecture: String,
    /// When it was made, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// When it came here, in seconds since 1970.
    pub added_seconds: u64,
    /// The path it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The names that the archive gives it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own_names: Vec<String>,
    /// Its layers, the lowest first.
    pub layers: Vec<LayerRecord>,
    /// The bytes in its layers before they were packed.
    pub unpacked_bytes: u64,
}

/// What the store knows of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of what it unpacks to.
    pub diff_id: Digest,
    /// The digest of it as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<Digest>,
}

impl Record {
    /// The same image, come another way: its layers may be here from before, and its size is the same.
    fn keep_what_is_known(&mut self, known: &Record) {
        if self.layers.len() == known.layers.len() {
            for (layer, known) in self.layers.iter_mut().zip(&known.layers) {
                layer.blob = layer.blob.or(known.blob);
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
    /// Reads the index's file.
    pub fn parse(json: &[u8]) -> Result<Index> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(json).context("it is corrupted")?;
        ensure!(version == VERSION, "it has format version {version}, and this husk supports version {VERSION}");
        serde_json::from_slice(json).context("it is corrupted")
    }

    /// The bytes of the index's file.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// The only image whose digest begins so.
    pub fn by_prefix(&self, hex: &str) -> Option<Digest> {
        let mut found = self.images.keys().filter(|id| id.hex().starts_with(hex));
        found.next().copied().filter(|_| found.next().is_none())
    }

    /// The names of an image.
    pub fn names_of(&self, id: Digest) -> Vec<&str> {
        self.names.iter().filter(|&(_, &named)| named == id).map(|(name, _)| name.as_str()).collect()
    }

    /// Puts an image in. What was made from an older state of the same path goes, unless it has a name.
    pub fn add(&mut self, id: Digest, mut record: Record, file: Option<String>) {
        if let Some(known) = self.images.get(&id) {
            record.keep_what_is_known(known);
        }
        if record.source.is_some() {
            let old = self.images.iter().filter(|&(&old, found)| found.source == record.source && old != id);
            let old: Vec<Digest> = old.map(|(&old, _)| old).collect();
            for old in old {
                if self.names_of(old).is_empty() {
                    self.remove(old);
                }
            }
        }
        self.images.insert(id, record);
        if let Some(file) = file {
            self.files.insert(file, id);
        }
    }

    /// Takes an image out, with all that leads to it.
    pub fn remove(&mut self, id: Digest) {
        self.images.remove(&id);
        self.names.retain(|_, named| *named != id);
        self.files.retain(|_, made| *made != id);
    }
}
