//! An image as `husk inspect` and `husk images --json` print it: Docker's names for what Docker has, and husk's own below `Husk`.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::time::rfc3339;
use crate::config::HealthCheck;
use crate::image::{Digest, ImageProcess, Listed};

/// An image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspected {
    id: Digest,
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    created: String,
    config: Config,
    architecture: String,
    os: &'static str,
    size: u64,
    #[serde(rename = "RootFS")]
    root_fs: RootFs,
    husk: Own,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    user: String,
    exposed_ports: BTreeMap<String, Empty>,
    env: Vec<String>,
    cmd: Vec<String>,
    volumes: BTreeMap<String, Empty>,
    working_dir: String,
    entrypoint: Vec<String>,
    labels: BTreeMap<String, String>,
    stop_signal: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    healthcheck: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Empty {}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RootFs {
    #[serde(rename = "Type")]
    kind: &'static str,
    layers: Vec<Digest>,
}

/// What Docker does not have.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Own {
    /// The file of the root file system in the store is named after it.
    root: Digest,
    root_bytes: u64,
    layer_bytes: u64,
    warm_bytes: u64,
    unpacked_bytes: u64,
    source: Option<String>,
    added: String,
}

/// What is known about an image.
pub fn inspect(image: Listed) -> Inspected {
    let Listed { id, names, root_bytes, layer_bytes, warm_bytes, record } = image;
    let (repo_digests, repo_tags): (Vec<String>, Vec<String>) = names.into_iter().partition(|name| name.contains('@'));
    let added = rfc3339(record.added_seconds.saturating_mul(1_000_000_000));
    Inspected {
        id,
        repo_tags,
        repo_digests,
        created: record.created.unwrap_or_else(|| added.clone()),
        config: config(record.process),
        architecture: record.architecture,
        os: "linux",
        size: root_bytes,
        root_fs: RootFs { kind: "layers", layers: record.layers.iter().map(|layer| layer.diff_id).collect() },
        husk: Own {
            root: record.root,
            root_bytes,
            layer_bytes,
            warm_bytes,
            unpacked_bytes: record.unpacked_bytes,
            source: record.source,
            added,
        },
    }
}

fn config(process: ImageProcess) -> Config {
    let ImageProcess {
        entrypoint,
        cmd,
        env,
        working_dir,
        user,
        stop_signal,
        volumes,
        exposed_ports,
        labels,
        healthcheck,
    } = process;
    let set = |names: Vec<String>| names.into_iter().map(|name| (name, Empty {})).collect();
    Config {
        user,
        exposed_ports: set(exposed_ports),
        env,
        cmd,
        volumes: set(volumes),
        working_dir,
        entrypoint,
        labels,
        stop_signal: stop_signal.unwrap_or_default(),
        healthcheck: healthcheck.as_ref().map(in_dockers_words),
    }
}

/// A health check as in an image's configuration.
fn in_dockers_words(check: &HealthCheck) -> Value {
    let ns = |ms: u64| ms.saturating_mul(1_000_000);
    json!({
        "Test": std::iter::once("CMD").chain(check.command.iter().map(String::as_str)).collect::<Vec<_>>(),
        "Interval": ns(check.interval_ms), "Timeout": ns(check.timeout_ms), "Retries": check.retries,
        "StartPeriod": ns(check.start_period_ms), "StartInterval": ns(check.start_interval_ms),
    })
}
