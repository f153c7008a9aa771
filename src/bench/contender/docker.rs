//! Docker, if its daemon is running.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::super::report::{self, Isolation};
use super::program::{Program, succeeds};
use super::{Contender, Fixture, Job, Launch, Unsupported, engine, example_job, strings, work_dir};
use crate::resources::programs;

/// Docker.
pub struct Docker(Program);

const NAME: &str = "docker";
/// How long the daemon may take to remove killed containers.
const CONTAINERS_END: Duration = Duration::from_secs(10);

impl Docker {
    /// Detects the daemon.
    pub fn find() -> Docker {
        let install = "sudo apt-get install docker.io && sudo systemctl start docker";
        Docker(Program::find(NAME, &["version", "--format", "{{.Server.Version}}"], install))
    }
}

fn command_line(fixture: &Fixture, scratch: Option<&Path>, job: &Job) -> Vec<String> {
    let mut line = strings(&["docker", "run"]);
    line.extend(engine::flags(fixture, NAME, scratch, job));
    line.push(fixture.id());
    line.extend(job.command.iter().cloned());
    line
}

impl Contender for Docker {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        self.0.describe(NAME, Isolation::Container, command_line(fixture, None, &example_job()), Vec::new())
    }

    /// Imports the root as an image. A bind mount would not work for users whose daemon runs on another host.
    fn prepare(&mut self, fixture: &Fixture) -> Result<()> {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--numeric-owner", "--xattrs", "--directory"]).arg(&fixture.root).arg(".");
        let mut tar = tar.stdout(Stdio::piped()).spawn().context("run tar")?;
        let files = tar.stdout.take().context("read tar's output")?;
        let import = Command::new(NAME).args(["import", "-", &fixture.id()]).stdin(files).output();
        let packed = tar.wait().context("wait for tar")?;
        let import = import.context("run docker import")?;
        let words = String::from_utf8_lossy(&import.stderr);
        ensure!(import.status.success() && packed.success(), "docker import: {} (tar: {packed})", words.trim());
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        if job.port.is_some() && !succeeds(NAME, &["network", "inspect", "bridge"]) {
            return Err(Unsupported("its daemon runs without a network (--bridge=none)".into()).into());
        }
        let id = fixture.instance_name(NAME, job);
        let remove = move || match succeeds(NAME, &["inspect", "--type", "container", &id]) {
            true => programs::run(NAME, &["rm", "--force", &id]),
            false => Ok(()),
        };
        engine::launch(fixture, NAME, job, |scratch| command_line(fixture, scratch, job), remove)
    }

    /// The container and its shim are children of the daemon.
    fn extra_processes(&self, fixture: &Fixture, job: &Job) -> Vec<u32> {
        let id = fixture.instance_name(NAME, job);
        let text = programs::output(NAME, &["inspect", "--format", "{{.State.Pid}}", &id]).unwrap_or_default();
        let Some(process) = text.trim().parse().ok().filter(|&process| process > 0) else { return Vec::new() };
        std::iter::once(process).chain(parent(process)).collect()
    }

    fn clean_up(&mut self, fixture: &Fixture) -> Result<()> {
        match succeeds(NAME, &["image", "inspect", &fixture.id()]) {
            true => remove_image(&fixture.id()),
            false => Ok(()),
        }
    }
}

/// Removes an image once the daemon has removed its containers; `--force` would only untag it.
fn remove_image(image: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        match programs::run(NAME, &["rmi", image]) {
            Err(_) if started.elapsed() < CONTAINERS_END => std::thread::sleep(Duration::from_millis(100)),
            removed => return removed,
        }
    }
}

/// Returns the parent process ID (proc_pid_stat(5): the second field after the name in parentheses).
fn parent(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok().filter(|&parent| parent > 1)
}

/// Stops the containers of a killed run and removes its image.
pub fn remove_leftovers(dir: &Path) {
    let id = work_dir::id_of(dir);
    if !succeeds(NAME, &["image", "inspect", &id]) {
        return;
    }
    let filter = format!("name={id}-");
    let left = programs::output(NAME, &["ps", "--all", "--quiet", "--filter", &filter]).unwrap_or_default();
    for container in left.split_whitespace() {
        // The daemon may already be removing it (--rm), which makes this fail.
        if let Err(error) = programs::run(NAME, &["rm", "--force", container]) {
            log::info!("{error:#}");
        }
    }
    if let Err(error) = remove_image(&id) {
        log::warn!("{error:#}");
    }
}
