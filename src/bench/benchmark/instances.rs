//! Several instances at once: memory per instance, how many fit into a budget, and how many start per second.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{BenchmarkContext, Measurements, check_cleanup, ensure_success};
use crate::bench::contender::{Contender, Job, Launch, WORKLOAD};
use crate::bench::memory_usage;
use crate::bench::run::{self, Expected, RunOptions, Running};
use crate::bench::statistics;
use crate::sandbox;

/// Instances started after the first; their mean is the memory of one more instance.
const EXTRA_INSTANCES: usize = 3;
const EXTRA_INSTANCES_QUICK: usize = 1;
/// How much an instance allocates and frees before its memory is measured again, in MiB.
const TOUCHED_MIB: u64 = 64;
/// Time for an instance to return freed memory; free page reporting in Linux waits two seconds.
const SETTLE: Duration = Duration::from_secs(3);
/// An upper bound on the instances started.
const MAX_INSTANCES: usize = 200;
const MAX_INSTANCES_QUICK: usize = 10;
/// The default budget: a fraction of the available memory, up to a limit.
const BUDGET_SHARE: u64 = 4;
const MAX_BUDGET_MIB: u64 = 4096;
/// Memory that the host keeps regardless of the budget.
const RESERVE_MIB: u64 = 256;

/// Idle instances, stopped on drop.
struct IdleInstances {
    running: Vec<(Running, Vec<u32>)>,
}

impl IdleInstances {
    fn pss_kib(&self) -> u64 {
        let roots: Vec<u32> = self.running.iter().map(|(running, _)| running.pid()).collect();
        let others: Vec<u32> = self.running.iter().flat_map(|(_, others)| others.iter().copied()).collect();
        memory_usage::pss_kib(&roots, &others)
    }

    fn end(self) -> Result<()> {
        // Stop all of them before reporting the first failure.
        let ended: Vec<_> = self.running.into_iter().map(|(running, _)| running.end()).collect();
        ended.iter().try_for_each(check_cleanup)
    }
}

impl BenchmarkContext<'_> {
    /// Starts one more idle instance and waits until it is ready.
    fn start_idle(&self, contender: &dyn Contender, idle_instances: &mut IdleInstances, words: &[&str]) -> Result<()> {
        let command = [WORKLOAD, "idle"].iter().chain(words).map(|&word| word.to_owned()).collect();
        let job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        let running = Running::start(contender.launch(self.fixture, &job)?, &self.long_running_options())?;
        running.wait_ready(self.timeout())?;
        idle_instances.running.push((running, contender.extra_processes(self.fixture, &job)));
        Ok(())
    }

    /// Averages over the instances after the first, because the first also pays for shared pages.
    pub(super) fn memory(&self, contender: &dyn Contender) -> Result<Measurements> {
        let mut idle_instances = IdleInstances { running: Vec::new() };
        self.start_idle(contender, &mut idle_instances, &[])?;
        std::thread::sleep(SETTLE);
        let first_kib = idle_instances.pss_kib();
        let more = if self.plan.sampling.quick { EXTRA_INSTANCES_QUICK } else { EXTRA_INSTANCES };
        let mut page_cache_kib = Vec::new();
        for _ in 0..more {
            // Sampled only around the start, since other programs also change the page cache.
            let before = memory_usage::page_cache_kib();
            self.start_idle(contender, &mut idle_instances, &[])?;
            page_cache_kib.push(memory_usage::page_cache_kib() as f64 - before as f64);
        }
        std::thread::sleep(SETTLE);
        let all_kib = idle_instances.pss_kib();
        idle_instances.end()?;
        ensure!(first_kib > 0, "the memory of its processes cannot be read");

        let mut worked = IdleInstances { running: Vec::new() };
        self.start_idle(contender, &mut worked, &["--touch", &TOUCHED_MIB.to_string()])?;
        std::thread::sleep(SETTLE);
        let after_work_kib = worked.pss_kib();
        worked.end()?;

        let values = vec![
            ("memory-idle", (all_kib as f64 - first_kib as f64) / more as f64 / 1024.0),
            ("memory-cache", statistics::median(&page_cache_kib) / 1024.0),
            ("memory-after-work", after_work_kib as f64 / 1024.0),
        ];
        Ok(Measurements { values, ..Measurements::default() })
    }

    /// Starts instances until the budget is spent, then measures concurrent starts.
    pub(super) fn density(&self, contender: &dyn Contender) -> Result<Measurements> {
        let max = if self.plan.sampling.quick { MAX_INSTANCES_QUICK } else { MAX_INSTANCES };
        let before = memory_usage::available_mib();
        let budget = self.plan.budget_mib.unwrap_or((before / BUDGET_SHARE).min(MAX_BUDGET_MIB));
        ensure!(
            before > budget + RESERVE_MIB,
            "only {before} MiB are available, too little for a budget of {budget} MiB"
        );
        let mut idle_instances = IdleInstances { running: Vec::new() };
        let is_spent = || before.saturating_sub(memory_usage::available_mib()) >= budget;
        while idle_instances.running.len() < max && !is_spent() {
            self.start_idle(contender, &mut idle_instances, &[])?;
        }
        let instances = idle_instances.running.len();
        let spent = instances < max || is_spent();
        idle_instances.end()?;
        let mut measurements =
            Measurements { values: vec![("density-starts", self.starts(contender)?)], ..Measurements::default() };
        match spent {
            true => measurements.values.push(("density-instances", instances as f64)),
            // The budget was not reached, so the number of instances is only a lower bound.
            false => measurements.skipped.push((
                "density-instances",
                format!("{max} instances, the maximum, fit into the budget of {budget} MiB"),
            )),
        }
        Ok(measurements)
    }

    /// Returns the number of starts per second, with one start in progress per processor.
    fn starts(&self, contender: &dyn Contender) -> Result<f64> {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let times = if self.plan.sampling.quick { 2 } else { 10 };
        let launches = (0..at_once * times)
            .map(|_| self.launch(contender, &["hello", "--exit", "0"]))
            .collect::<Result<Vec<_>>>()?;
        let all = launches.len();
        let queue = Arc::new(Mutex::new(launches));
        let started = Instant::now();
        let starters = (0..at_once)
            .map(|_| {
                let (queue, options) = (queue.clone(), self.options());
                sandbox::spawn("starter", move || start_each(&queue, &options))
            })
            .collect::<Result<Vec<_>, _>>()?;
        // Join all threads before reporting the first failure.
        let ended: Vec<Result<()>> = starters
            .into_iter()
            .map(|starter| starter.join().unwrap_or_else(|_| bail!("a starter thread panicked")))
            .collect();
        ended.into_iter().collect::<Result<()>>()?;
        Ok(all as f64 / started.elapsed().as_secs_f64())
    }
}

/// Starts instances one after the other until the queue is empty.
fn start_each(queue: &Mutex<Vec<Launch>>, options: &RunOptions) -> Result<()> {
    while let Some(launch) = queue.lock().map_or(None, |mut queue| queue.pop()) {
        ensure_success(run::run(launch, &Expected::default(), options))?;
    }
    Ok(())
}
