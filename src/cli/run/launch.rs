//! Starts the machine of `husk run`: from a warm image if one fits, or by booting it.

use std::sync::Arc;

use anyhow::Result;

use super::session::{self, Ended, Start};
use super::{Run, machine};
use crate::cli::boot;
use crate::cli::exit::Exit;
use crate::config::MachineConfig;
use crate::guest::GuestSpec;
use crate::monitor::release;
use crate::resources::guest_kernel::GuestKernel;
use crate::resources::{self, Source};
use crate::snapshot::{Snapshot, warm};
use crate::supervisor::{self, ControlEndpoint, Stdio};
use crate::sys::SignalFd;
use crate::timings::{Step, Timings};

impl Run {
    /// Runs the machine once.
    pub(super) fn run_machine(
        &self,
        spec: &GuestSpec,
        kernel: &GuestKernel,
        config: &MachineConfig,
        endpoint: &mut ControlEndpoint,
        signals: &SignalFd,
        timings: &Arc<Timings>,
    ) -> Result<Exit> {
        let warm = match &self.from {
            Some(dir) => Some(warm::open(dir, config)?),
            None if self.no_warm => None,
            None => warm_image(spec, config),
        };
        let may_boot = warm.is_some() && self.from.is_none();
        match self.start(spec, kernel, config, warm, endpoint, signals, timings) {
            Err(error) if may_boot && !endpoint.has_run() => {
                log::warn!("the warm image cannot be used, renew it with `husk warm`: {error:#}");
                // Its files are locked until then.
                release::await_exit();
                self.start(spec, kernel, config, None, endpoint, signals, timings)
            }
            ended => ended,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a run consists of")]
    fn start(
        &self,
        spec: &GuestSpec,
        kernel: &GuestKernel,
        config: &MachineConfig,
        warm: Option<Snapshot>,
        endpoint: &mut ControlEndpoint,
        signals: &SignalFd,
        timings: &Arc<Timings>,
    ) -> Result<Exit> {
        let (source, start) = match warm {
            Some(Snapshot { description, files, path, .. }) => {
                let (overlay, run) = spec.begin(&description.config.networks)?;
                let unrecorded = files.touched.is_none().then_some(path);
                (Source::Snapshot(files), Start::Begin(overlay, run, self.docker.attached(), unrecorded))
            }
            None => {
                let initramfs = spec.initramfs(kernel, config.virtio_bus())?;
                let (stdin, terminal) = (spec.wants_stdin(), spec.on_terminal());
                (
                    machine::boot_source(kernel, initramfs)?,
                    Start::Boot { stdin, terminal, attached: self.docker.attached() },
                )
            }
        };
        resources::host::warn_of_pvm();
        timings.mark(Step::Prepared);
        let opened = resources::open_for(config, source)?;
        if spec.has_session() {
            return session::run(config, opened, start, endpoint, signals, timings).map(Ended::exit);
        }
        let reason = supervisor::run(config, opened, timings.clone(), signals, Stdio::Console, endpoint)?;
        Ok(boot::report(&reason))
    }
}

/// The warm image that a machine of this configuration can start from.
fn warm_image(spec: &GuestSpec, config: &MachineConfig) -> Option<Snapshot> {
    let found = spec.has_session().then(|| warm::find(config)).flatten();
    if found.is_some() {
        log::info!("the machine starts from a warm image: --no-warm boots it instead");
    }
    found
}
