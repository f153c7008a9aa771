//! Applies a layer's tar stream to the merged tree, including whiteouts (OCI image specification, layer.md).

use anyhow::{Context, Result, ensure};

use super::erofs::Writer;
use super::tar::{self, Archive, Kind, Skip};
use super::tree::{Body, Tree, components};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The prefix of aufs's internal files, which still exist in old archives.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// The meaning of names that start with `.wh.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// They remove files of lower layers.
    Apply,
    /// They are regular files: the archive is a root file system, not a layer.
    Keep,
}

/// Applies a layer on top of `tree`. Reads the stream up to the end-of-archive marker, which may be followed by more
/// data. Returns it, and the size of the layer's files.
pub fn apply<R: Skip>(layer: R, whiteouts: Whiteouts, tree: &mut Tree, writer: &mut Writer) -> Result<(R, u64)> {
    tree.begin_layer();
    let (mut archive, mut files_bytes) = (Archive::new(layer), 0_u64);
    while let Some(entry) = archive.next_entry()? {
        let path = entry.path.clone();
        let names = components(&path).with_context(|| tar::shown(&path))?;
        match names.split_last() {
            Some((name, parents)) if whiteouts == Whiteouts::Apply && name.starts_with(WHITEOUT_PREFIX) => {
                whiteout(&parents.join(&b'/'), name, tree)
            }
            _ => {
                files_bytes = files_bytes.saturating_add(file_bytes(&entry));
                put(entry, &mut archive, tree, writer)
            }
        }
        .with_context(|| tar::shown(&path))?;
        for content in tree.take_forgotten() {
            writer.forget(&content)?;
        }
    }
    Ok((archive.into_inner(), files_bytes))
}

/// The size of a file, whatever it takes in the archive.
fn file_bytes(entry: &tar::TarEntry) -> u64 {
    match entry.kind {
        Kind::File => entry.content_bytes,
        Kind::Sparse { size_bytes, .. } => size_bytes,
        _ => 0,
    }
}

fn whiteout(parent: &[u8], name: &[u8], tree: &mut Tree) -> Result<()> {
    if name == OPAQUE {
        return tree.whiteout_content(parent);
    }
    if name.starts_with(AUFS_PREFIX) {
        return Ok(());
    }
    let hidden = &name[WHITEOUT_PREFIX.len()..];
    ensure!(!matches!(hidden, b"" | b"." | b".."), "a whiteout without a name");
    tree.whiteout(&[parent, b"/", hidden].concat())
}

fn put<R: Skip>(entry: tar::TarEntry, archive: &mut Archive<R>, tree: &mut Tree, writer: &mut Writer) -> Result<()> {
    let tar::TarEntry { path, kind, attributes, content_bytes } = entry;
    let body = match kind {
        Kind::Hardlink(target) => return tree.link(&path, &target),
        Kind::File => Body::File(writer.content(&mut archive.content(), content_bytes, &attributes)?),
        Kind::Sparse { size_bytes, parts } => {
            Body::File(writer.sparse_content(&mut archive.content(), size_bytes, &parts)?)
        }
        Kind::Directory => Body::empty_directory(),
        Kind::Symlink(target) => Body::Symlink(target.into()),
        Kind::Character { major, minor } => Body::Character { major, minor },
        Kind::Block { major, minor } => Body::Block { major, minor },
        Kind::Fifo => Body::Fifo,
    };
    tree.insert(&path, attributes, body)
}
