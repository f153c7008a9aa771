//! Images prepared on demand: an image that is not in the store is fetched and unpacked by a child process (`husk
//! prepare`).
//!
//! Registries and archives are untrusted, so a process that later becomes a virtual machine monitor never reads them.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use log::Level;

use super::reference::Reference;
use super::{Prepared, Source, Store};
use crate::resources::root_file::{self, Kind};

/// A concurrent `husk prune` may remove an image right after it was prepared.
const ATTEMPTS: usize = 2;

/// Returns the kind of root that `word` refers to. A word that is a valid image name is taken as a name, even if a file
/// of that name exists.
pub fn identify(word: &Path) -> Result<Kind> {
    let Some(text) = word.to_str() else { return Ok(root_file::identify(word)) };
    match text.parse()? {
        Source::Path { path, .. } if path == word => Ok(root_file::identify(word)),
        source @ Source::Name { path: Some(_), .. } => {
            Ok(Store::open_default()?.path_of(&source)?.map_or(Kind::Other, root_file::identify))
        }
        _ => Ok(Kind::Other),
    }
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Even if the store has it.
    Always,
    /// If the store does not have it.
    #[default]
    Missing,
    /// Not at all.
    Never,
}

/// How an image is found.
#[derive(Debug, Clone, Copy, Default)]
pub struct Finding<'a> {
    /// When it is pulled.
    pub pull: PullPolicy,
    /// The platform of which it is pulled; by default that of machines.
    pub platform: Option<&'a str>,
    /// Limits the bytes written while unpacking; the default is the free disk space.
    pub max_bytes: Option<u64>,
    /// Whether what reads foreign data is confined.
    pub sandbox: bool,
    /// Whether no progress is shown.
    pub quiet: bool,
}

/// Returns the image that `word` names, preparing it in a child process if the store does not have it. Returns `None`
/// if the child failed; it has printed the reason.
pub fn find_or_prepare(word: &str, finding: Finding<'_>) -> Result<Option<Prepared>> {
    let store = Store::open_default()?;
    let source = word.parse::<Source>()?;
    if let Source::Path { path, image: None } = &source
        && !word.starts_with(['/', '.', '~'])
        && !path.exists()
        && let Err(error) = word.parse::<Reference>()
    {
        bail!("{error:#}; and there is no such file");
    }
    let comes_from_registry = matches!(source, Source::Name { .. }) && store.path_of(&source)?.is_none();
    if !(comes_from_registry && finding.pull == PullPolicy::Always)
        && let Some(prepared) = store.prepared(&source)?
    {
        return Ok(Some(prepared));
    }
    ensure!(
        !(comes_from_registry && finding.pull == PullPolicy::Never),
        "no such image: {word}, and --pull never keeps it from being pulled"
    );
    for _ in 0..ATTEMPTS {
        let Some(id) = prepare_in_child(word, finding)? else { return Ok(None) };
        if let Some(prepared) = store.prepared(&Source::Id(id))? {
            return Ok(Some(prepared));
        }
    }
    bail!("{word} was removed right after it was prepared: try again")
}

/// Returns the image's ID, or `None` if the child failed and printed the reason.
fn prepare_in_child(word: &str, finding: Finding<'_>) -> Result<Option<String>> {
    let Finding { pull, platform, max_bytes, sandbox, quiet } = finding;
    // Not by path: husk may have been upgraded in the meantime.
    let mut command = Command::new("/proc/self/exe");
    command.arg("prepare");
    if let Some(bytes) = max_bytes {
        command.arg("--max-size").arg(bytes.to_string());
    }
    if pull == PullPolicy::Always {
        command.arg("--pull");
    }
    if let Some(platform) = platform {
        command.args(["--platform", platform]);
    }
    if quiet {
        command.arg("--quiet");
    }
    if !sandbox {
        command.args(["--sandbox", "off"]);
    }
    let levels = [Level::Info, Level::Debug, Level::Trace];
    command.args(levels.iter().filter(|&&level| log::log_enabled!(level)).map(|_| "--verbose"));
    command.arg("--").arg(word).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("start the process that prepares the image")?;
    let mut id = String::new();
    if let Some(stdout) = &mut child.stdout {
        stdout.read_to_string(&mut id).context("read the image's ID")?;
    }
    let status = child.wait().context("wait for the image")?;
    match status.code() {
        Some(0) => Ok(Some(id)),
        Some(_) => Ok(None),
        None => bail!("the process that prepares the image was terminated: {status}"),
    }
}
