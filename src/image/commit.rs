//! Makes images of what machines have changed: `husk commit`.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::changes;
use super::config::ImageProcess;
use super::digest::Digest;
use super::index::LayerRecord;
use super::make::Making;
use super::progress::Progress;
use super::store::Store;

/// What a machine's image becomes.
#[derive(Debug)]
pub enum Top {
    /// The same with one layer more, an archive with the changes.
    Layer(File),
    /// One whose only layer is an archive of the whole root file system.
    Root(File),
}

/// What a machine ran, which its image goes on with.
#[derive(Debug, Default)]
pub struct Ran {
    /// The program and its arguments, with those of the image's entrypoint.
    pub command: Vec<String>,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// The working directory.
    pub working_dir: String,
    /// The user, if the image's was not root or another one was given.
    pub user: String,
    /// Further labels.
    pub labels: BTreeMap<String, String>,
}

impl Ran {
    /// Changes the configuration of the machine's image to that of the machine.
    fn apply(&self, config: &mut Map<String, Value>) {
        let entrypoint = config.get("Entrypoint").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let begins =
            self.command.len() >= entrypoint.len() && entrypoint.iter().zip(&self.command).all(|(a, b)| a == b);
        let arguments = if begins { self.command.get(entrypoint.len()..) } else { None };
        if arguments.is_none() {
            config.remove("Entrypoint");
        }
        config.insert("Cmd".into(), arguments.unwrap_or(&self.command).into());
        config.insert("Env".into(), self.env.as_slice().into());
        config.insert("WorkingDir".into(), self.working_dir.as_str().into());
        config.insert("User".into(), self.user.as_str().into());
        for (key, value) in &self.labels {
            changes::add(config, "Labels", key.clone(), value.as_str().into());
        }
    }
}

impl Store {
    /// The image with this identity, and whether the store has all of its layers, so that another one can be put on top.
    pub fn base(&self, identity: &str) -> Result<Option<(Digest, bool)>> {
        let index = self.index()?;
        let Some((id, record)) = index.by_prefix(identity).and_then(|id| Some((id, index.images.get(&id)?))) else {
            return Ok(None);
        };
        let has = |layer: &LayerRecord| layer.blob.is_some_and(|blob| self.blob_path(blob).exists());
        Ok(Some((id, !record.layers.is_empty() && record.layers.iter().all(has))))
    }

    /// Makes an image of the machine that has the image `base`, and returns its ID.
    pub fn commit(
        &self,
        base: Option<Digest>,
        top: Top,
        author: &str,
        making: &Making<'_>,
        progress: Progress,
    ) -> Result<Digest> {
        let _blobs = self.use_blobs()?;
        let index = self.index()?;
        let record = base.and_then(|base| index.images.get(&base));
        let (archive, below) = match top {
            Top::Layer(archive) => (archive, record.context("the machine's image is not in the store")?.layers.clone()),
            Top::Root(archive) => (archive, Vec::new()),
        };
        let digest = self.keep_archive(archive)?;
        let layers: Vec<LayerRecord> = below.into_iter().chain([LayerRecord::new(digest, Some(digest))]).collect();
        let config = match base.map(|base| self.config_of(base)).transpose()?.flatten() {
            Some(json) => serde_json::from_slice(&json).context("read the configuration of the image")?,
            None => json!({ "config": record.map(|record| process(&record.process)) }),
        };
        self.keep_made(&extended(config, &layers, author, making)?, layers, making.name, progress)
    }
}

/// The configuration of an image with these layers, of which the last one is new, and its history.
fn extended(mut image: Value, layers: &[LayerRecord], author: &str, making: &Making<'_>) -> Result<Vec<u8>> {
    let object = image.as_object_mut().context("the configuration of the image is no object")?;
    let created = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
    let mut config = match object.remove("config") {
        Some(Value::Object(config)) => config,
        _ => Map::new(),
    };
    making.ran.iter().for_each(|ran| ran.apply(&mut config));
    making.changes.iter().try_for_each(|change| changes::apply(&mut config, change))?;
    object.insert("config".into(), config.into());
    for (name, value) in [("architecture", "amd64"), ("os", "linux")] {
        object.entry(name).or_insert_with(|| value.into());
    }
    // About the machine that has made the image below.
    ["container", "container_config", "author"].iter().for_each(|name| drop(object.remove(*name)));
    let mut step = json!({ "created": created, "created_by": "husk commit", "comment": making.comment });
    if !author.is_empty() {
        object.insert("author".into(), author.into());
        step["author"] = author.into();
    }
    object.insert("created".into(), created.into());
    let mut history = match object.remove("history") {
        Some(Value::Array(steps)) if layers.len() > 1 => steps,
        _ => Vec::new(),
    };
    history.push(step);
    object.insert("history".into(), history.into());
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
    object.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": diff_ids }));
    let json = serde_json::to_vec(&image)?;
    ensure!(json.len() as u64 <= super::config::JSON_MAX_BYTES, "the configuration of the image is too large");
    Ok(json)
}

/// The process configuration of an image whose own configuration was not kept (OCI image specification, config.md).
fn process(process: &ImageProcess) -> Value {
    let set = |names: &[String]| names.iter().map(|name| (name.clone(), json!({}))).collect::<Map<_, _>>();
    let ImageProcess { entrypoint, cmd, env, working_dir, user, stop_signal, volumes, exposed_ports, labels, .. } =
        process;
    json!({
        "Entrypoint": entrypoint, "Cmd": cmd, "Env": env, "WorkingDir": working_dir, "User": user, "Labels": labels,
        "StopSignal": stop_signal, "Volumes": set(volumes), "ExposedPorts": set(exposed_ports),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;
    use crate::image::tar_write;

    /// An archive with a file of this name.
    fn archive(store: &Store, name: &str) -> File {
        let mut file = store.nameless_file().unwrap();
        tar_write::file(name, 1, &b"x"[..], &mut file).unwrap();
        tar_write::end(&mut file).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn a_committed_image_has_one_layer_more_or_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let changes = ["CMD [\"old\"]".to_owned(), "ENV A=1".to_owned()];
        let making = Making { changes: &changes, comment: "base", ..Making::default() };
        let base = store.import_root(archive(&store, "below"), &making, Progress::Hidden).unwrap();
        assert_eq!(store.base(&base.hex()[..32]).unwrap(), Some((base, true)));
        assert_eq!(store.base("0123456789abcdef").unwrap(), None);
        let changes = ["CMD [\"new\"]".to_owned()];
        let name = "made:1".parse().unwrap();
        let making = Making { name: Some(&name), changes: &changes, comment: "why", ..Making::default() };
        let layer = Top::Layer(archive(&store, "above"));
        let id = store.commit(Some(base), layer, "me", &making, Progress::Hidden).unwrap();
        let config: Value = serde_json::from_slice(&store.config_of(id).unwrap().unwrap()).unwrap();
        assert_eq!((&config["config"]["Cmd"], &config["config"]["Env"]), (&json!(["new"]), &json!(["A=1"])));
        assert_eq!((&config["author"], config["history"].as_array().unwrap().len()), (&json!("me"), 2));
        assert_eq!(config["history"][1]["comment"], "why");
        let record = store.index().unwrap().images[&id].clone();
        assert_eq!((record.layers.len(), record.process.cmd), (2, vec!["new".to_owned()]));
        assert_eq!(store.index().unwrap().names.values().collect::<Vec<_>>(), [&id]);
        let root = Top::Root(archive(&store, "all"));
        let flat = store.commit(Some(base), root, "", &Making::default(), Progress::Hidden).unwrap();
        let record = store.index().unwrap().images[&flat].clone();
        assert_eq!((record.layers.len(), record.process.cmd), (1, vec!["old".to_owned()]));
        let bare =
            store.commit(None, Top::Root(archive(&store, "all")), "", &Making::default(), Progress::Hidden).unwrap();
        assert!(store.index().unwrap().images[&bare].process.cmd.is_empty());
    }

    #[test]
    fn an_image_goes_on_with_what_its_machine_ran() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let applied = |image: Value, command: &[&str]| {
            let labels = BTreeMap::from([("of".to_owned(), "machine".to_owned())]);
            let env = texts(&["A=1"]);
            let ran = Ran { command: texts(command), env, working_dir: "/w".into(), user: "7".into(), labels };
            let mut config = image.as_object().unwrap().clone();
            ran.apply(&mut config);
            Value::from(config)
        };
        let image = json!({ "Entrypoint": ["a", "b"], "Cmd": ["c"], "Labels": { "own": "x" }, "ExposedPorts": { "1/tcp": {} } });
        let others = json!({ "Env": ["A=1"], "WorkingDir": "/w", "User": "7", "Labels": { "own": "x", "of": "machine" },
            "ExposedPorts": { "1/tcp": {} }, "Entrypoint": ["a", "b"], "Cmd": ["d", "e"] });
        assert_eq!(applied(image.clone(), &["a", "b", "d", "e"]), others);
        let replaced = applied(image.clone(), &["a", "x"]);
        assert_eq!((replaced.get("Entrypoint"), &replaced["Cmd"]), (None, &json!(["a", "x"])));
        assert_eq!(applied(image, &["a"]).get("Entrypoint"), None);
        assert_eq!(applied(json!({}), &["sh"])["Cmd"], json!(["sh"]));
    }
}
