//! Makes images of a root file system's archive: `husk import`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::bundle::{self, Part};
use super::changes;
use super::commit::Ran;
use super::config::ImageConfig;
use super::digest::{Digest, Hasher};
use super::index::{LayerRecord, Record};
use super::progress::Progress;
use super::reference::Reference;
use super::store::Store;
use super::unpack;
use crate::sandbox::ThreadRole;
use crate::sandbox::task::{self, Confined};

/// What an image is made with beside its layer.
#[derive(Debug, Default)]
pub struct Making<'a> {
    /// Its name.
    pub name: Option<&'a Reference>,
    /// Instructions for its configuration (see [`changes::apply`]).
    pub changes: &'a [String],
    /// What the machine ran that it is made of.
    pub ran: Option<&'a Ran>,
    /// A comment for its history.
    pub comment: &'a str,
    /// Where the archive is from.
    pub from: &'a str,
}

impl Store {
    /// Makes an image whose only layer is an archive, compressed or not, and returns its ID.
    pub fn import_root(&self, archive: File, making: &Making<'_>, progress: Progress) -> Result<Digest> {
        let _blobs = self.use_blobs()?;
        let mut config = Map::new();
        making.changes.iter().try_for_each(|change| changes::apply(&mut config, change))?;
        let archive = self.seekable(archive)?;
        ensure!(archive.metadata()?.len() > 0, "it is empty");
        let diff_id = self.unpacked_digest(&archive)?;
        let blob = self.keep_archive(archive)?;
        let layers = vec![LayerRecord::new(diff_id, Some(blob))];
        self.keep_made(&config_json(diff_id, config, making)?, layers, making.name, progress)
    }

    /// Keeps an archive that is a layer, and returns its digest.
    pub(super) fn keep_archive(&self, archive: File) -> Result<Digest> {
        let digest = bundle::digest_of(&archive)?;
        if let Some(mut work) = self.begin_blob(digest)? {
            work.file.set_len(0)?;
            io::copy(&mut Part::whole(archive)?, &mut work.file).context("copy the archive to the store")?;
            self.keep_blob(digest, work)?;
        }
        Ok(digest)
    }

    /// Keeps an image with the configuration `json` and these layers, builds its root file system, and returns its ID. Fails if
    /// a layer is not in the store.
    pub(super) fn keep_made(
        &self,
        json: &[u8],
        layers: Vec<LayerRecord>,
        name: Option<&Reference>,
        progress: Progress,
    ) -> Result<Digest> {
        let image = ImageConfig::parse(json)?;
        let stored = layers.iter().map(|layer| {
            let blob = layer.blob.context("the store has not all of the machine's image: pull it again")?;
            self.stored_layer(blob, layer.diff_id)
        });
        let root = self.root_of_layers(stored.collect::<Result<_>>()?, progress)?;
        self.keep_config(json)?;
        let record = Record {
            root: root.key,
            process: image.process,
            architecture: image.architecture,
            created: image.created,
            added_seconds: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            source: None,
            own_names: Vec::new(),
            layers,
            unpacked_bytes: root.unpacked.bytes,
        };
        let id = Digest::of(json);
        self.record(id, record, root, None, name.map(Reference::to_string).into_iter().collect())?;
        Ok(id)
    }

    /// The digest of the uncompressed content of an archive, found by a confined process.
    fn unpacked_digest(&self, archive: &File) -> Result<Digest> {
        let max_bytes = self.unpack_limit()?;
        let part = Part::whole(archive.try_clone()?)?;
        let files = vec![part.as_raw_fd()];
        let hash = || -> Result<Digest> {
            let mut hasher = Hasher::default();
            let unpacked_bytes = io::copy(&mut unpack::unpacked(part)?.take(max_bytes), &mut hasher)?;
            ensure!(
                unpacked_bytes < max_bytes,
                "it unpacks to more than the {} MiB of free or allowed disk space",
                max_bytes >> 20
            );
            Ok(hasher.digest())
        };
        if !self.sandbox {
            return hash();
        }
        let confined = Confined { role: ThreadRole::Unpacker, files, file_bytes_max: 0 };
        task::run(Some(&confined), hash, &mut |_: ()| -> Result<task::Answer<()>> { bail!("it has no questions") })
    }
}

fn config_json(diff_id: Digest, config: Map<String, Value>, making: &Making<'_>) -> Result<Vec<u8>> {
    let created = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
    let comment =
        if making.comment.is_empty() { format!("Imported from {}", making.from) } else { making.comment.to_owned() };
    let json = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": created, "comment": comment }],
    });
    Ok(serde_json::to_vec(&json)?)
}
