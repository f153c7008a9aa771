//! Images of machines that stay: their changes fit no other image, so it is not removed before they are.

use std::fs;

use serde::Deserialize;

use super::digest::Digest;
use super::manage::entries;
use super::store::Store;

/// What matters here of a machine's record (state_dir/record.rs).
#[derive(Deserialize)]
struct Machine {
    id: String,
    name: Option<String>,
    #[serde(default)]
    image_id: Option<String>,
}

impl Store {
    /// The names, or else IDs, of the machines that stay and have the image `id`.
    pub(super) fn machines_with(&self, id: Digest) -> Vec<String> {
        let records = entries(&self.dir().join("machines")).filter_map(|dir| fs::read(dir.join("record.json")).ok());
        let machines = records.filter_map(|json| serde_json::from_slice::<Machine>(&json).ok());
        let has_image = |image_id: &String| !image_id.is_empty() && id.hex().starts_with(image_id.as_str());
        let with_image = machines.filter(|machine| machine.image_id.as_ref().is_some_and(has_image));
        with_image.map(|machine| machine.name.unwrap_or(machine.id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_in_use_by_the_machines_that_have_changed_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (image, other) = (Digest::of(b"image"), Digest::of(b"other"));
        assert!(store.machines_with(image).is_empty());
        let add = |id: &str, json: String| {
            let machine = dir.path().join("machines").join(id);
            fs::create_dir_all(&machine).unwrap();
            fs::write(machine.join("record.json"), json).unwrap();
        };
        add("one", format!(r#"{{"id": "one", "name": "web", "image_id": "{}", "more": 1}}"#, &image.hex()[..32]));
        add("two", r#"{"id": "two", "name": null}"#.into());
        add("three", "{".into());
        add("four", r#"{"id": "four", "name": null, "image_id": ""}"#.into());
        assert_eq!(store.machines_with(image), ["web"]);
        assert!(store.machines_with(other).is_empty());
    }
}
