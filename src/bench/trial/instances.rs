//! Several instances at once: what each costs the host in memory, how many fit, and how many start in a second.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{Context, Found, dirt, succeeded};
use crate::bench::contender::{Contender, Job, Launch, WORK};
use crate::bench::cost;
use crate::bench::run::{self, Conditions, Expected, Running};
use crate::bench::statistics;
use crate::sandbox;

/// Instances beyond the first, whose mean is what one more costs; and for a quick look.
const MORE: usize = 3;
const MORE_QUICK: usize = 1;
/// What an instance touches and frees before its memory is looked at again, in MiB.
const TOUCHED_MIB: u64 = 64;
/// Time for an instance to give back what it has freed: free page reporting waits two seconds in Linux.
const SETTLE: Duration = Duration::from_secs(3);
/// More instances than this tell nothing new.
const MOST_INSTANCES: usize = 200;
const MOST_INSTANCES_QUICK: usize = 10;
/// A share of what is available, where the user names no budget, and its bound.
const BUDGET_SHARE: u64 = 4;
const MOST_BUDGET_MIB: u64 = 4096;
/// What the host keeps whatever the budget is.
const RESERVE_MIB: u64 = 256;

/// Idle instances; all are ended when it is dropped.
struct Crowd {
    running: Vec<(Running, Vec<u32>)>,
}

impl Crowd {
    fn pss_kib(&self) -> u64 {
        let roots: Vec<u32> = self.running.iter().map(|(running, _)| running.pid()).collect();
        let others: Vec<u32> = self.running.iter().flat_map(|(_, others)| others.iter().copied()).collect();
        cost::pss_kib(&roots, &others)
    }

    fn end(self) -> Result<()> {
        // All of them, whatever the first ones say.
        let ended: Vec<_> = self.running.into_iter().map(|(running, _)| running.end()).collect();
        ended.iter().try_for_each(dirt)
    }
}

impl Context<'_> {
    /// Starts one more idle instance and waits until it says that it is ready.
    fn idle(&self, contender: &dyn Contender, crowd: &mut Crowd, words: &[&str]) -> Result<()> {
        let command = [WORK, "idle"].iter().chain(words).map(|&word| word.to_owned()).collect();
        let job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        let running = Running::start(contender.launch(self.ground, &job)?, &self.long_conditions())?;
        running.wait_ready(self.deadline())?;
        crowd.running.push((running, contender.more_processes(self.ground, &job)));
        Ok(())
    }

    /// The mean of some instances beyond the first, which pays for what all of them share.
    pub(super) fn memory(&self, contender: &dyn Contender) -> Result<Found> {
        let mut crowd = Crowd { running: Vec::new() };
        self.idle(contender, &mut crowd, &[])?;
        std::thread::sleep(SETTLE);
        let first_kib = crowd.pss_kib();
        let more = if self.plan.effort.quick { MORE_QUICK } else { MORE };
        let mut page_cache_kib = Vec::new();
        for _ in 0..more {
            // Only as long as a start takes: the host reads and forgets for others, too.
            let before = cost::page_cache_kib();
            self.idle(contender, &mut crowd, &[])?;
            page_cache_kib.push(cost::page_cache_kib() as f64 - before as f64);
        }
        std::thread::sleep(SETTLE);
        let all_kib = crowd.pss_kib();
        crowd.end()?;
        ensure!(first_kib > 0, "its processes cannot be looked into");

        let mut worked = Crowd { running: Vec::new() };
        self.idle(contender, &mut worked, &["--touch", &TOUCHED_MIB.to_string()])?;
        std::thread::sleep(SETTLE);
        let after_work_kib = worked.pss_kib();
        worked.end()?;

        let values = vec![
            ("memory-idle", (all_kib as f64 - first_kib as f64) / more as f64 / 1024.0),
            ("memory-cache", statistics::median(&page_cache_kib) / 1024.0),
            ("memory-after-work", after_work_kib as f64 / 1024.0),
        ];
        Ok(Found { values, ..Found::default() })
    }

    /// Instances until the budget is spent, then as many at once as there are processors, again and again.
    pub(super) fn density(&self, contender: &dyn Contender) -> Result<Found> {
        let most = if self.plan.effort.quick { MOST_INSTANCES_QUICK } else { MOST_INSTANCES };
        let before = cost::available_mib();
        let budget = self.plan.budget_mib.unwrap_or((before / BUDGET_SHARE).min(MOST_BUDGET_MIB));
        ensure!(before > budget + RESERVE_MIB, "{before} MiB are available, of which {budget} MiB cannot be spent");
        let mut crowd = Crowd { running: Vec::new() };
        let is_spent = || before.saturating_sub(cost::available_mib()) >= budget;
        while crowd.running.len() < most && !is_spent() {
            self.idle(contender, &mut crowd, &[])?;
        }
        let instances = crowd.running.len();
        let spent = instances < most || is_spent();
        crowd.end()?;
        let mut found = Found { values: vec![("density-starts", self.starts(contender)?)], ..Found::default() };
        match spent {
            true => found.values.push(("density-instances", instances as f64)),
            // How many more would fit is not known, and no number of anybody's may be held against it.
            false => found.pointless.push((
                "density-instances",
                format!("{most} instances, which is all that are started, fit into the budget of {budget} MiB"),
            )),
        }
        Ok(found)
    }

    /// Starts a second, with as many under way at any time as there are processors.
    fn starts(&self, contender: &dyn Contender) -> Result<f64> {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let times = if self.plan.effort.quick { 2 } else { 10 };
        let launches = (0..at_once * times)
            .map(|_| self.launch(contender, &["hello", "--exit", "0"]))
            .collect::<Result<Vec<_>>>()?;
        let all = launches.len();
        let queue = Arc::new(Mutex::new(launches));
        let started = Instant::now();
        let starters = (0..at_once)
            .map(|_| {
                let (queue, conditions) = (queue.clone(), self.conditions());
                sandbox::spawn("starter", move || start_each(&queue, &conditions))
            })
            .collect::<Result<Vec<_>, _>>()?;
        // All of them, whatever the first ones say.
        let ended: Vec<Result<()>> =
            starters.into_iter().map(|starter| starter.join().unwrap_or_else(|_| bail!("a starter failed"))).collect();
        ended.into_iter().collect::<Result<()>>()?;
        Ok(all as f64 / started.elapsed().as_secs_f64())
    }
}

/// Starts one after the other until none is left.
fn start_each(queue: &Mutex<Vec<Launch>>, conditions: &Conditions) -> Result<()> {
    while let Some(launch) = queue.lock().map_or(None, |mut queue| queue.pop()) {
        succeeded(run::run(launch, &Expected::default(), conditions))?;
    }
    Ok(())
}
