//! `husk prepare`, which `husk run` starts for an image that is not ready: what comes from registries and archives is fetched and
//! unpacked by a process that ends with that, and never by one that is a machine's monitor.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use log::Level;

use super::exit::Exit;
use super::size;
use crate::image::{Form, Prepared, Progress, Source, Store};
use crate::resources::root_file::{self, Kind};
use crate::sys;

/// So often an image may be gone again when it has just been made: someone is cleaning up.
const ATTEMPTS: usize = 2;

/// The flags of `husk prepare`. No user types them.
#[derive(Debug, Args)]
pub struct Prepare {
    /// Source of the image
    #[arg(value_name = "IMAGE")]
    image: String,

    /// Limit the disk space for downloading and unpacking the image
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    max_size: Option<u64>,

    /// Do not compress the root filesystem (to measure the cost of compression)
    #[arg(long)]
    plain: bool,
}

impl Prepare {
    /// Makes the image ready, its progress on standard error, and prints its ID.
    pub fn run(self) -> Result<Exit> {
        sys::end_with_parent().context("tie this process to the lifetime of its parent")?;
        let mut store = Store::open_default()?;
        store.unpack_limit_bytes = self.max_size;
        if self.plain {
            store.form = Form::Plain;
        }
        let source = self.image.parse()?;
        if matches!(source, Source::Name { path: None, .. }) && Path::new(&self.image).exists() {
            super::say(&format!("husk: {0} is taken as an image name; use ./{0} for the file\n", self.image));
        }
        let prepared = store.prepare(&source, &Progress::on_terminal())?;
        if prepared.is_bare_root {
            let list = "manifest.json or index.json";
            super::say(&format!("husk: {} has no {list}: taken as a root filesystem\n", self.image));
        }
        super::print(&prepared.id.hex())?;
        Ok(Exit::Success)
    }
}

/// What the file that `word` is tells of itself. A word that can be an image's name is one, whatever files there are.
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

/// The image that `word` names: at once where it is ready, else another process makes it so. `None` if that has said why it
/// cannot be. `max_bytes` is the most that it may take on its way; without it, what is free on the disk.
pub fn find(word: &str, max_bytes: Option<u64>) -> Result<Option<Prepared>> {
    let store = Store::open_default()?;
    if let Some(prepared) = store.prepared(&word.parse::<Source>()?)? {
        return Ok(Some(prepared));
    }
    for _ in 0..ATTEMPTS {
        let Some(id) = prepare_elsewhere(word, max_bytes)? else { return Ok(None) };
        if let Some(prepared) = store.prepared(&Source::Id(id))? {
            return Ok(Some(prepared));
        }
    }
    bail!("{word} was removed right after it was prepared: try again")
}

/// Returns the image's ID, or `None` if the other process failed, and said why.
fn prepare_elsewhere(word: &str, max_bytes: Option<u64>) -> Result<Option<String>> {
    // Not by its path, where there may be another version by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg("prepare");
    if let Some(bytes) = max_bytes {
        command.arg("--max-size").arg(bytes.to_string());
    }
    let levels = [Level::Info, Level::Debug, Level::Trace];
    command.args(levels.iter().filter(|&&level| log::log_enabled!(level)).map(|_| "-v"));
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
