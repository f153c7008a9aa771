//! `husk commit`: makes an image of a machine and what it has changed.

use anyhow::{Context, Result};
use clap::Args;
use husk_protocol::{COPY_CHANGES, COPY_ROOT};

use super::exit::Exit;
use super::export;
use super::import::ImportFlags;
use super::reach::Reached;
use crate::image::Progress;
use crate::image::commit::{Ran, Top};
use crate::image::make::Making;
use crate::image::reference::Reference;
use crate::image::tar_stream::Content;
use crate::state_dir::record::{Inherited, Record, Text};
use crate::sys::allocator;

const EXAMPLES: &str = "\
Examples:
  husk commit web web:2
  husk commit -m 'with curl' -c 'CMD [\"nginx\"]' web web:2

The image has the configuration of the machine's image, with the command, the environment, the user, the working directory
and the labels of the machine, and one layer more with the changes; or, if the store has not all
layers of that image, a single one with all files. What is mounted in the machine, such as volumes, is left out. The
machine may be running, and is not paused: programs may be writing meanwhile.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Commit {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Name for the image
    #[arg(value_name = "NAME[:TAG]", value_parser = super::pull::reference)]
    name: Option<Reference>,

    /// Author of the image
    #[arg(short, long, value_name = "TEXT", default_value = "")]
    author: String,

    /// Apply an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR
    #[arg(short, long = "change", value_name = "INSTRUCTION")]
    changes: Vec<String>,

    /// Comment for the image's history
    #[arg(short, long, value_name = "TEXT", default_value = "")]
    message: String,

    #[command(flatten)]
    import: ImportFlags,

    /// Only the ID is printed anyway
    #[arg(short, long, hide = true)]
    quiet: bool,

    /// The machine is not paused: for compatibility with `docker commit`
    #[arg(short, long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pause: Option<bool>,
}

impl Commit {
    /// Makes the image and prints its ID.
    pub fn run(self) -> Result<Exit> {
        // The image is made in confined copies of this process, which must not open files, after a thread has run here.
        allocator::use_one_arena();
        let store = self.import.store()?;
        let machine = Reached::find(&self.machine)?;
        let record = machine.asked_for().record()?;
        let (image, ran) = (record.image_id.clone(), ran(record));
        let base = image.map(|image| store.base(&image)).transpose()?.flatten();
        let mut archive = store.nameless_file().context("create a file for the layer")?;
        let top = match base {
            Some((_, true)) => {
                export::archive(&machine, COPY_CHANGES, Content::Layer, &mut archive)?;
                Top::Layer(archive)
            }
            _ => {
                export::archive(&machine, COPY_ROOT, Content::Root, &mut archive)?;
                Top::Root(archive)
            }
        };
        machine.release()?;
        let making = Making {
            name: self.name.as_ref(),
            changes: &self.changes,
            ran: ran.as_ref(),
            comment: &self.message,
            from: "",
        };
        let base = base.map(|(id, _)| id);
        let id = store.commit(base, top, &self.author, &making, Progress::on_terminal()).context("make the image")?;
        super::print(&format!("{id}\n"))?;
        Ok(Exit::Success)
    }
}

/// What the machine ran, unless that was an init of the image.
fn ran(record: &Record) -> Option<Ran> {
    let Inherited { env, working_dir, user, .. } = record.process.clone()?;
    let text = |text: Text| String::from_utf8_lossy(&Vec::from(text)).into_owned();
    Some(Ran {
        command: record.command.clone(),
        env: env.into_iter().map(text).collect(),
        working_dir: text(working_dir),
        user,
        labels: record.labels.clone(),
    })
}
