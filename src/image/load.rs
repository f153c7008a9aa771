//! Loads images from archives with all that is needed to save them again: their names, layers and configurations.

use std::fs::File;

use anyhow::{Context, Result};

use super::Prepared;
use super::import::Scope;
use super::progress::Progress;
use super::reference::Reference;
use super::source::Source;
use super::store::Store;

/// A loaded image, and its names.
pub type Loaded = (Prepared, Vec<String>);

impl Store {
    /// Loads all images at a path, and tags them with their names in the archive, or the only one with `name`.
    pub fn load(&self, source: &Source, name: Option<&Reference>, progress: Progress) -> Result<Vec<Loaded>> {
        // Protects layers that no image has yet.
        let _blobs = self.use_blobs()?;
        let Source::Path { path, image } = source else {
            return Ok(vec![self.name(self.prepare(source, progress)?, name)?]);
        };
        let load = |scope: Scope<'_>| {
            let (prepared, count) = self.load_path(path, scope, progress)?;
            self.name(prepared, name).map(|loaded| (loaded, count))
        };
        if let Some(image) = image {
            return Ok(vec![load(Scope::Named(image))?.0]);
        }
        // A name is that of the only image.
        let (first, count) = load(if name.is_some() { Scope::Only } else { Scope::Nth(0) })?;
        let others = (1..count).map(|nth| load(Scope::Nth(nth)).map(|(loaded, _)| loaded));
        std::iter::once(Ok(first)).chain(others).collect()
    }

    /// Like [`Store::load`], for an archive read from `input`.
    pub fn load_stream(&self, input: File, name: Option<&Reference>, progress: Progress) -> Result<Vec<Loaded>> {
        let _blobs = self.use_blobs()?;
        let load = || -> Result<Vec<Loaded>> {
            let file = self.seekable(input)?;
            let load = |scope: Scope<'_>| {
                let (prepared, count) = self.load_file(file.try_clone()?, scope, progress)?;
                self.name(prepared, name).map(|loaded| (loaded, count))
            };
            let (first, count) = load(if name.is_some() { Scope::Only } else { Scope::Nth(0) })?;
            let others = (1..count).map(|nth| load(Scope::Nth(nth)).map(|(loaded, _)| loaded));
            std::iter::once(Ok(first)).chain(others).collect()
        };
        load().context("load the image from standard input")
    }

    /// Tags an image with `name`, or with the names in its archive. Returns the names.
    fn name(&self, prepared: Prepared, name: Option<&Reference>) -> Result<Loaded> {
        let own_names =
            self.index()?.images.get(&prepared.id).map(|record| record.own_names.clone()).unwrap_or_default();
        let names: Vec<Reference> = match name {
            Some(name) => vec![name.clone()],
            // A layout may use arbitrary strings as names.
            None => own_names.iter().filter_map(|name| name.parse().ok()).collect(),
        };
        self.tag(prepared.id, &names)?;
        Ok((prepared, names.iter().map(Reference::familiar).collect()))
    }
}
