//! `husk generate`: files for the host's service manager, which starts machines with the host.

mod unit;
mod words;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use self::unit::Unit;
use super::exit::Exit;
use super::lifecycle;
use crate::state_dir::origin::Origin;
use crate::state_dir::{MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  As root, start the machine web with the host:
    husk create --name web -p 80:80 ./image.tar
    husk generate systemd --name --files web
    mv husk-web.service /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --now husk-web

  As another user:
    husk generate systemd --name --files web
    mv husk-web.service ~/.config/systemd/user/
    systemctl --user daemon-reload
    systemctl --user enable --now husk-web
    loginctl enable-linger             (also without a login)

The unit runs `husk start -a` in the foreground; its output goes to the journal and to `husk logs`. With
--new, it makes the machine anew at each start, with the options that it was created with, and removes it when it
stops; the unit then contains them, with the values of -e.";

#[derive(Debug, Args)]
pub(super) struct Generate {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate a systemd unit for a machine
    Systemd(Systemd),
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
struct Systemd {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Use the name of the machine instead of its ID
    #[arg(short, long)]
    name: bool,

    /// Make the machine anew at each start instead of starting the existing one
    #[arg(long)]
    new: bool,

    /// Write the unit to a file in the working directory, and print its path
    #[arg(short, long)]
    files: bool,

    /// When systemd restarts the machine
    #[arg(long, value_name = "POLICY", default_value = "on-failure")]
    #[arg(value_parser = ["no", "on-success", "on-failure", "on-abnormal", "on-watchdog", "on-abort", "always"])]
    restart_policy: String,

    /// Time to wait before killing the machine, in seconds
    #[arg(short = 't', long, alias = "time", value_name = "SECONDS", default_value = "10")]
    stop_timeout: u32,
}

impl Generate {
    /// Executes the subcommand.
    pub fn run(self) -> Result<Exit> {
        let Command::Systemd(systemd) = self.command;
        systemd.run()
    }
}

impl Systemd {
    /// Prints the unit, or writes it to a file.
    fn run(self) -> Result<Exit> {
        let entry = StateDir::open()?.find(&self.machine)?;
        lifecycle::check_restartable(&entry)?;
        let machine = if self.name { entry.name() } else { &entry.id };
        let husk = std::env::current_exe().context("find husk's own program")?;
        let text = self.unit(&entry, machine, &husk)?.to_string();
        if !self.files {
            return super::print(&text).map(|()| Exit::Success);
        }
        let path =
            std::env::current_dir().context("get the working directory")?.join(format!("husk-{machine}.service"));
        self.write(&path, &text).with_context(|| format!("write {}", path.display()))?;
        super::print(&format!("{}\n", path.display()))?;
        Ok(Exit::Success)
    }

    /// Writes the file, or replaces it. Values of -e may be secrets.
    fn write(&self, path: &Path, text: &str) -> std::io::Result<()> {
        // An existing file would keep its mode.
        let part = path.with_extension("service.part");
        let _ = fs::remove_file(&part);
        let mode = if self.new { 0o600 } else { 0o644 };
        File::options().write(true).create_new(true).mode(mode).open(&part)?.write_all(text.as_bytes())?;
        fs::rename(part, path)
    }

    fn unit(&self, entry: &MachineEntry, machine: &str, husk: &Path) -> Result<Unit> {
        let origin = Origin::read(entry)?;
        let working_dir = self.new.then(|| origin.dir());
        working_dir.as_deref().map_or(Ok(()), unit::check_plain)?;
        let start = if self.new {
            self.start_anew(machine, &origin)?
        } else {
            ["start", "-a", machine].map(OsString::from).into()
        };
        let runtime_dir = Some(entry.base()).filter(|base| base.ends_with("husk")).and_then(Path::parent);
        let data = ["HUSK_DATA", "XDG_DATA_HOME", "HOME"];
        let data = data.iter().filter_map(|name| Some(((*name).to_owned(), origin.variable(name)?))).collect();
        Ok(Unit {
            machine: machine.to_owned(),
            husk: husk.to_owned(),
            working_dir,
            start,
            is_new: self.new,
            stop_seconds: self.stop_timeout,
            restart: self.restart_policy.clone(),
            runtime_dir: runtime_dir.map(PathBuf::from),
            is_root: rustix::process::getuid().is_root(),
            variables: data,
        })
    }

    /// The command that makes the machine anew, in the foreground.
    fn start_anew(&self, machine: &str, origin: &Origin) -> Result<Vec<OsString>> {
        let (command, rest) =
            words::without(&origin.words(), &["detach", "rm", "name", "restart", "cidfile", "log_max"])?;
        ensure!(command != "restore", "a machine that was restored cannot be made anew: leave out --new");
        let command = if command == "create" { "run".into() } else { command };
        let own = ["--rm".into(), format!("--name={machine}").into()];
        Ok([command].into_iter().chain(own).chain(rest).collect())
    }
}
