//! Round trips from a guest instruction to husk and back, measured by the guest's clock.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::{Target, boot, median, output_of, report};

const RUNS: usize = 5;

/// Port I/O and MMIO without a device, and a doorbell, from CPL 0 and from CPL 3.
pub fn round_trips() -> Result<()> {
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(output_of(boot(husk_guests::TRIPS, "count=10000"))?);
    }
    for (kind, name) in
        [("port", "port I/O exit and back"), ("mmio", "MMIO exit and back"), ("doorbell", "ioeventfd kick")]
    {
        for ring in ["cpl0", "cpl3"] {
            let line = format!("{kind} {ring} ");
            let of_run = |text: &String| text.lines().find_map(|l| l.strip_prefix(&line)?.parse::<f64>().ok());
            let times_ns = runs.iter().map(of_run).collect::<Option<Vec<f64>>>().context("the guest gave no time")?;
            report(&format!("{name}, from {ring}"), median(times_ns) / 1e3, "us", Target::None);
        }
    }
    Ok(())
}

/// The time of a doorbell's exit from CPL 3.
pub fn doorbell() -> Result<Duration> {
    let text = output_of(boot(husk_guests::TRIPS, "count=10000"))?;
    let time = text.lines().find_map(|line| line.strip_prefix("doorbell cpl3 ")?.parse().ok());
    Ok(Duration::from_nanos(time.context("the guest gave no time")?))
}
