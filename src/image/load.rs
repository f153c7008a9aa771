//! Loads images from archives with all that is needed to save them again: their names, layers and configurations.

use std::fs::File;

use anyhow::{Context, Result, ensure};

use super::Prepared;
use super::import::Scope;
use super::progress::Progress;
use super::reference::Reference;
use super::source::Source;
use super::store::Store;

/// The maximum number of images in an archive: each is read by a process of its own.
const IMAGES_MAX: usize = 1000;

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
        load_all(name, load)
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
            load_all(name, load)
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

/// Loads all images of an archive, or the only one, for which `name` is. `load` loads one, and says how many there are.
fn load_all<T>(name: Option<&Reference>, load: impl Fn(Scope<'static>) -> Result<(T, usize)>) -> Result<Vec<T>> {
    let (first, count) = load(if name.is_some() { Scope::Only } else { Scope::Nth(0) })?;
    ensure!(
        count <= IMAGES_MAX,
        "it has {count} images, and at most {IMAGES_MAX} are loaded at once: choose one with docker-archive:FILE:NAME"
    );
    let others = (1..count).map(|nth| load(Scope::Nth(nth)).map(|(loaded, _)| loaded));
    std::iter::once(Ok(first)).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_images_are_loaded_up_to_a_limit() {
        let load = |count: usize| {
            load_all(None, |scope| match scope {
                Scope::Nth(nth) => Ok((nth, count)),
                _ => unreachable!(),
            })
        };
        assert_eq!(load(3).unwrap(), [0, 1, 2]);
        assert_eq!(load(IMAGES_MAX).unwrap().len(), IMAGES_MAX);
        assert!(load(usize::MAX).unwrap_err().to_string().contains("docker-archive:FILE:NAME"));
        let name = "made:1".parse().unwrap();
        assert_eq!(load_all(Some(&name), |scope| Ok((matches!(scope, Scope::Only), 1))).unwrap(), [true]);
    }
}
