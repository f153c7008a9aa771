//! Starts the machine of `husk run`: from a warm image if one fits, or by booting it.

use std::sync::Arc;

use anyhow::Result;

use super::session::{self, Ended, Start};
use super::{Run, machine};
use crate::cli::boot;
use crate::cli::exit::Exit;
use crate::config::MachineConfig;
use crate::guest::GuestSpec;
use crate::guest::session::Attached;
use crate::resources;
use crate::resources::guest_kernel::GuestKernel;
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
        let start =
            |warm, endpoint: &mut ControlEndpoint| self.start(spec, kernel, config, warm, endpoint, signals, timings);
        if let Some(dir) = &self.from {
            return start(Some(warm::open(dir, config)?), endpoint);
        }
        let warm = if self.no_warm { None } else { warm_image(spec, config) };
        let refused = "the warm image cannot be used, renew it with `husk warm`";
        session::start_or_boot(warm, refused, endpoint, start)
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
        let attached = Attached { outlived: self.lifecycle.is_unsignaled(), ..self.docker.attached() };
        let (source, start) = match warm {
            Some(snapshot) => session::begin(spec, snapshot, attached)?,
            None => {
                let initramfs = spec.initramfs(kernel, config.virtio_bus())?;
                let (stdin, terminal) = (spec.wants_stdin(), spec.on_terminal());
                (machine::boot_source(kernel, initramfs)?, Start::Boot { stdin, terminal, attached })
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
