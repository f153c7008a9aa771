//! How long a neighbor that prints a line every few milliseconds stalls while another instance crashes.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::{BenchmarkContext, Crash, Measurements, check_cleanup};
use crate::bench::contender::Contender;
use crate::bench::run::{self, Expected, Run, Running, Termination};

/// The interval between two ticks of the neighbor.
const TICK_MS: &str = "10";
/// The neighbor is observed before the crash to establish its rhythm, and afterwards to catch delayed effects.
const WATCH: Duration = Duration::from_secs(1);

impl BenchmarkContext<'_> {
    /// Measures the longest stall of a neighbor, from the start of the victim until shortly after its end.
    pub(super) fn isolation(&self, contender: &dyn Contender, crash: Crash) -> Result<Measurements> {
        let neighbor = Running::start(self.launch(contender, &["tick", TICK_MS])?, &self.long_running_options())?;
        neighbor.wait_ready(self.timeout())?;
        std::thread::sleep(WATCH);
        // Twice the memory limit: without an enforced limit, the victim stops by itself and the host survives.
        let most = (self.plan.limits.memory_mib * 2).to_string();
        let (metric, words): (_, &[&str]) = match crash {
            Crash::Kernel => ("isolation-kernel", &["crash", "kernel", "--this-is-a-machine"]),
            Crash::OutOfMemory => ("isolation-memory", &["crash", "memory", "--at-most", &most]),
        };
        let launch = self.launch(contender, words)?;
        let before = neighbor.ticks();
        neighbor.reset_stall();
        let victim = run::run(launch, &Expected::default(), &self.options());
        std::thread::sleep(WATCH);
        let (stall, after) = (neighbor.longest_stall(), neighbor.ticks());
        let alive = neighbor.is_running();
        check_cleanup(&neighbor.end())?;
        ensure!(alive, "the neighbor exited, too");
        ensure!(after > before, "the neighbor has stalled since");
        has_crashed(&victim)?;
        Ok(Measurements { values: vec![(metric, stall.as_secs_f64() * 1e3)], ..Measurements::default() })
    }
}

/// Checks that the victim crashed as intended and in time.
fn has_crashed(victim: &Run) -> Result<()> {
    ensure!(victim.ready.is_some(), "the victim did not start: {}", victim.failures.join("; "));
    ensure!(victim.end != Termination::TimedOut, "the victim did not exit in time");
    let survived = victim.failures.iter().find(|failure| failure.starts_with("crash"));
    survived.map_or(Ok(()), |failure| bail!("the victim did not crash: {failure}"))
}
