//! What an image costs beyond its kernel: `husk run IMAGE true` beside `husk boot` of the same kernel with a first process
//! that powers off at once, in turn.
//!
//! The clock is this process's own, from start to exit. `scripts/overhead` runs it where KVM runs real kernels.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// How many times as long as the bare kernel a run may take.
const RATIO_MAX: f64 = 1.3;

fn main() -> ExitCode {
    match measure() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("overhead: {error}");
            ExitCode::from(2)
        }
    }
}

fn measure() -> Result<bool, String> {
    let get = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set; scripts/overhead sets it"));
    let (husk, kernel) = (get("OVERHEAD_HUSK")?, get("OVERHEAD_KERNEL")?);
    let (initrd, image, memory) = (get("OVERHEAD_INITRD")?, get("OVERHEAD_IMAGE")?, get("OVERHEAD_MEMORY")?);
    let runs: usize = get("OVERHEAD_RUNS")?.parse().map_err(|_| "OVERHEAD_RUNS is no number")?;
    let bare = ["boot", "--kernel", &kernel, "--memory", &memory, "--initrd", &initrd];
    let image = ["run", "--kernel", &kernel, "--memory", &memory, &image, "true"];
    let mut times: [Vec<f64>; 2] = Default::default();
    println!("{:<8}{:>14}{:>14}{:>8}", "round", "boot (ms)", "run (ms)", "ratio");
    // The first round prepares the image and warms the page cache, and is not counted.
    for round in 0..=runs {
        let [boot, run] = [time(&husk, &bare)?, time(&husk, &image)?];
        if round > 0 {
            println!("{round:<8}{boot:>14.1}{run:>14.1}{:>8.2}", run / boot);
            times[0].push(boot);
            times[1].push(run);
        }
    }
    // Of neighbours: the machine's own noise is mostly the same in both.
    let ratio = median(times[0].iter().zip(&times[1]).map(|(boot, run)| run / boot).collect());
    let [boot, run] = times.map(median);
    println!("median: boot {boot:.1} ms, run {run:.1} ms, run/boot {ratio:.2} (aim: below {RATIO_MAX})");
    Ok(ratio < RATIO_MAX)
}

/// Milliseconds from start to exit, which has to be a good one.
fn time(husk: &str, words: &[&str]) -> Result<f64, String> {
    let start = Instant::now();
    let output =
        Command::new(husk).args(words).stdin(Stdio::null()).output().map_err(|error| format!("{husk}: {error}"))?;
    let millis = start.elapsed().as_secs_f64() * 1e3;
    if output.status.success() {
        Ok(millis)
    } else {
        Err(format!("{words:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
