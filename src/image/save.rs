//! Writes images of the store to an archive that docker, podman and skopeo load, and describes them for a registry.
//!
//! ```text
//! blobs/sha256/HEX   layers, configurations, OCI manifests
//! index.json         the images of an OCI image layout, with oci-layout
//! manifest.json      the same images for `docker load`
//! ```
//!
//! Layers are written as they were loaded or pulled, so that an image has the same ID and the same layers everywhere. Nothing of them
//! is parsed but the first bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::bundle::Part;
use super::digest::Digest;
use super::index::LayerRecord;
use super::reference::{Reference, Version};
use super::source::Source;
use super::store::Store;
use super::{docker_archive, oci_layout, tar_write, unpack};
use crate::decompress::Compression;

/// The media type of an OCI manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// The format of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archive {
    /// For docker, and everything that reads its archives.
    Docker,
    /// An OCI image layout only.
    Oci,
}

/// An image with all that it consists of.
pub struct Whole {
    /// The configuration, whose digest is the image's ID.
    pub config: Vec<u8>,
    /// Its layers' archives, lowest first.
    pub layers: Vec<Blob>,
    /// The OCI manifest.
    pub manifest: Vec<u8>,
}

/// A layer's archive.
#[derive(Debug)]
pub struct Blob {
    /// The digest of the file.
    pub digest: Digest,
    /// The file, which is not removed as long as the store's layers are in use.
    pub file: File,
    /// Its size.
    pub size_bytes: u64,
}

impl Store {
    /// Writes an archive of `images`, each with its name, if that has a tag.
    pub fn save(&self, images: &[Source], archive: Archive, out: &mut impl Write) -> Result<()> {
        let _blobs = self.use_blobs()?;
        let mut chosen: Vec<(Digest, Vec<Reference>)> = Vec::new();
        for image in images {
            let id = self.find(image)?.id;
            let place = chosen.iter().position(|(known, _)| *known == id).unwrap_or_else(|| {
                chosen.push((id, Vec::new()));
                chosen.len() - 1
            });
            let reference = match image {
                Source::Name { reference, .. } => Some(reference),
                Source::Id(_) | Source::Path { .. } => None,
            };
            // The start of an ID is no name.
            let is_name = |it: &&Reference| matches!(it.version, Version::Tag(_)) && self.has_name(it).unwrap_or(false);
            chosen[place].1.extend(reference.filter(is_name).cloned());
        }
        let mut writer = Writer { out, written: BTreeSet::new() };
        let (mut index, mut list) = (Vec::new(), Vec::new());
        for (id, names) in chosen {
            let whole = self.whole(id)?;
            index.extend(descriptors(&whole, &names));
            list.push(entry(id, &whole, &names));
            writer.image(&whole)?;
        }
        writer.lists(&index, list, archive)
    }

    /// The image with this ID, with its configuration and layers. They are not removed while [`Store::use_blobs`] protects them.
    pub(super) fn whole(&self, id: Digest) -> Result<Whole> {
        let index = self.index()?;
        let record = index.images.get(&id).with_context(|| format!("no such image: {}", id.short()))?;
        ensure!(
            id != record.root,
            "image {} is a bare root filesystem: make an image of it with `husk import`",
            id.short()
        );
        let lacks =
            || format!("the store has not all of image {}: load it with `husk load`, or pull it again", id.short());
        let config = self.config_of(id)?.with_context(lacks)?;
        let mut layers = Vec::new();
        for layer in &record.layers {
            let digest = layer.blob.with_context(lacks)?;
            let file = File::open(self.blob_path(digest)).with_context(lacks)?;
            let size_bytes = file.metadata()?.len();
            layers.push(Blob { digest, file, size_bytes });
        }
        let manifest = serde_json::to_vec(&manifest(&config, &layers)?)?;
        Ok(Whole { config, layers, manifest })
    }

    fn has_name(&self, name: &Reference) -> Result<bool> {
        Ok(self.index()?.names.contains_key(&name.to_string()))
    }
}

fn manifest(config: &[u8], layers: &[Blob]) -> Result<Value> {
    let layers = layers.iter().map(|layer| {
        let media_type = format!("{LAYER_TYPE}{}", compression(layer)?);
        Ok(json!({ "mediaType": media_type, "digest": layer.digest, "size": layer.size_bytes }))
    });
    Ok(json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": { "mediaType": CONFIG_TYPE, "digest": Digest::of(config), "size": config.len() },
        "layers": layers.collect::<Result<Vec<_>>>()?,
    }))
}

/// The suffix of a layer's media type.
fn compression(layer: &Blob) -> Result<&'static str> {
    let mut start = Vec::new();
    Part::whole(layer.file.try_clone()?)?.take(512).read_to_end(&mut start)?;
    Ok(match unpack::compression(&start) {
        None => "",
        Some(Compression::Gzip) => "+gzip",
        Some(Compression::Zstd) => "+zstd",
        Some(other) => {
            bail!("layer {} is compressed with {other}, which OCI images have no name for", layer.digest.short())
        }
    })
}

/// The descriptors of an image in an OCI index: one for each name.
fn descriptors(image: &Whole, names: &[Reference]) -> Vec<Value> {
    let descriptor =
        || json!({ "mediaType": MANIFEST_TYPE, "digest": Digest::of(&image.manifest), "size": image.manifest.len() });
    let named = |name: &Reference| {
        let mut descriptor = descriptor();
        descriptor["annotations"] = json!({
            oci_layout::FULL_NAME: name.to_string(), oci_layout::REF_NAME: name.version(),
        });
        descriptor
    };
    if names.is_empty() { vec![descriptor()] } else { names.iter().map(named).collect() }
}

/// The entry of an image in Docker's list.
fn entry(id: Digest, image: &Whole, names: &[Reference]) -> Value {
    json!({
        "Config": path(id),
        "RepoTags": names.iter().map(Reference::familiar).collect::<Vec<_>>(),
        "Layers": image.layers.iter().map(|layer| path(layer.digest)).collect::<Vec<_>>(),
    })
}

fn path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

struct Writer<'a, W> {
    out: &'a mut W,
    /// Images share layers.
    written: BTreeSet<Digest>,
}

impl<W: Write> Writer<'_, W> {
    fn image(&mut self, image: &Whole) -> Result<()> {
        for layer in &image.layers {
            if self.written.insert(layer.digest) {
                let content = Part::whole(layer.file.try_clone()?)?;
                self.file(&path(layer.digest), layer.size_bytes, content)?;
            }
        }
        for json in [&image.config, &image.manifest] {
            if self.written.insert(Digest::of(json)) {
                self.json(&path(Digest::of(json)), json)?;
            }
        }
        Ok(())
    }

    fn lists(mut self, index: &[Value], list: Vec<Value>, archive: Archive) -> Result<()> {
        self.json(oci_layout::MARK, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": index });
        self.json(oci_layout::INDEX, &serde_json::to_vec(&index)?)?;
        if archive == Archive::Docker {
            self.json(docker_archive::MANIFEST, &serde_json::to_vec(&list)?)?;
        }
        tar_write::end(self.out).context("write the archive")
    }

    fn json(&mut self, name: &str, json: &[u8]) -> Result<()> {
        self.file(name, json.len() as u64, json)
    }

    fn file(&mut self, name: &str, size_bytes: u64, content: impl Read) -> Result<()> {
        tar_write::file(name, size_bytes, content, self.out).context("write the archive")
    }
}

/// A step in the history of an image, latest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// When it was made, in RFC 3339, if known.
    pub created: Option<String>,
    /// The command.
    pub created_by: String,
    /// Of its author.
    pub comment: String,
    /// The size of the files in its layer or, if that is not known, of the layer as it is stored; 0 without one.
    pub size_bytes: u64,
}

impl Store {
    /// The history of an image, as its configuration has it.
    pub fn history(&self, image: &Source) -> Result<(Digest, Vec<Step>)> {
        let image = self.find(image)?;
        let config: Value = match self.config_of(image.id)? {
            Some(json) => serde_json::from_slice(&json).context("read the image's configuration")?,
            None => Value::Null,
        };
        let sizes: BTreeMap<Digest, u64> = image
            .record
            .layers
            .iter()
            .filter_map(|layer| {
                let blob = layer.blob?;
                Some((blob, std::fs::metadata(self.blob_path(blob)).ok()?.len()))
            })
            .collect();
        let stored = |layer: &LayerRecord| layer.blob.and_then(|blob| sizes.get(&blob).copied());
        let mut layers = image.record.layers.iter().map(|layer| layer.files_bytes.or_else(|| stored(layer)));
        let no_steps = Vec::new();
        let steps = config["history"].as_array().unwrap_or(&no_steps);
        let text = |step: &Value, key: &str| step[key].as_str().unwrap_or_default().to_owned();
        let mut all: Vec<Step> = steps
            .iter()
            .map(|step| Step {
                created: step["created"].as_str().map(str::to_owned),
                created_by: text(step, "created_by"),
                comment: text(step, "comment"),
                size_bytes: if step["empty_layer"] == true { 0 } else { layers.next().flatten().unwrap_or(0) },
            })
            .collect();
        // Layers that the history does not mention.
        all.extend(layers.map(|size_bytes| Step {
            created: image.record.created.clone(),
            created_by: String::new(),
            comment: String::new(),
            size_bytes: size_bytes.unwrap_or(0),
        }));
        all.reverse();
        Ok((image.id, all))
    }
}
