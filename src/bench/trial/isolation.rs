//! An instance that says something every few milliseconds, beside one that crashes: how long is it silent?

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::{Context, Crash, Found, dirt};
use crate::bench::contender::Contender;
use crate::bench::run::{self, End, Expected, Run, Running};

/// Between two ticks of the neighbour.
const TICK_MS: &str = "10";
/// The neighbour is watched before the crash, so that it ticks, and after it, so that what comes late is seen.
const WATCH: Duration = Duration::from_secs(1);

impl Context<'_> {
    /// The longest silence of a neighbour, from the start of the victim's crash to a while after its end.
    pub(super) fn isolation(&self, contender: &dyn Contender, crash: Crash) -> Result<Found> {
        let neighbour = Running::start(self.launch(contender, &["tick", TICK_MS])?, &self.long_conditions())?;
        neighbour.wait_ready(self.deadline())?;
        std::thread::sleep(WATCH);
        // Twice what the instance may have: where nothing stops it there, it stops by itself and the host lives on.
        let most = (self.plan.limits.memory_mib * 2).to_string();
        let (measure, words): (_, &[&str]) = match crash {
            Crash::Kernel => ("isolation-kernel", &["crash", "kernel", "--this-is-a-machine"]),
            Crash::Memory => ("isolation-memory", &["crash", "memory", "--at-most", &most]),
        };
        let launch = self.launch(contender, words)?;
        let before = neighbour.ticks();
        neighbour.forget_silence();
        let victim = run::run(launch, &Expected::default(), &self.conditions());
        std::thread::sleep(WATCH);
        let (silence, after) = (neighbour.longest_silence(), neighbour.ticks());
        let alive = neighbour.is_running();
        dirt(&neighbour.end())?;
        ensure!(alive, "the neighbour ended with it");
        ensure!(after > before, "the neighbour is silent since");
        has_crashed(&victim)?;
        Ok(Found { values: vec![(measure, silence.as_secs_f64() * 1e3)], ..Found::default() })
    }
}

/// Whether the victim did what it was started for, and was over in time.
fn has_crashed(victim: &Run) -> Result<()> {
    ensure!(victim.ready.is_some(), "the one that had to crash did not start: {}", victim.failures.join("; "));
    ensure!(victim.end != End::Deadline, "the one that crashed was not over in time");
    let survived = victim.failures.iter().find(|failure| failure.starts_with("crash"));
    survived.map_or(Ok(()), |failure| bail!("nothing stopped the one that had to crash: {failure}"))
}
