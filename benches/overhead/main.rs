//! The overhead of an image: `husk run IMAGE true` compared with `husk boot` of the same kernel with an init that
//! powers off at once, in turn; and `husk exec` of `true` in a running machine.
//!
//! Times are wall-clock times of this process, from start to exit. `scripts/overhead` runs it where KVM runs real
//! kernels.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// The target ratio of a run to a boot of the bare kernel.
const RATIO_MAX: f64 = 1.3;

/// Reads every file of the root once, and prints the duration in nanoseconds.
const READ_ALL: &str = "start=$(date +%s%N); find /usr /bin /lib -xdev -type f -exec cat {} + >/dev/null; \
    echo $(($(date +%s%N) - start))";

fn main() -> ExitCode {
    let measured = match std::env::var("OVERHEAD_ROOTS") {
        Ok(roots) => measure_reads(&roots),
        Err(_) => measure(),
    };
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("overhead: {error}");
            ExitCode::from(2)
        }
    }
}

fn get(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; scripts/overhead sets it"))
}

/// Compares how long a guest takes to read two roots that differ only in compression, in turn: `PLAIN:COMPRESSED`.
fn measure_reads(roots: &str) -> Result<bool, String> {
    let (husk, kernel, memory) = (get("OVERHEAD_HUSK")?, get("OVERHEAD_KERNEL")?, get("OVERHEAD_MEMORY")?);
    let runs: usize = get("OVERHEAD_RUNS")?.parse().map_err(|_| "OVERHEAD_RUNS is not a number")?;
    let (plain, compressed) = roots.split_once(':').ok_or("OVERHEAD_ROOTS must name two roots")?;
    let read = |root: &str| -> Result<f64, String> {
        let words = ["run", "--kernel", &kernel, "--memory", &memory, root, "sh", "-c", READ_ALL];
        let nanoseconds = output(&husk, &words)?;
        nanoseconds.trim().parse::<f64>().map(|nanos| nanos / 1e6).map_err(|_| format!("not a duration: {nanoseconds}"))
    };
    println!("{:<8}{:>14}{:>14}{:>8}", "round", "plain (ms)", "LZ4 (ms)", "ratio");
    let mut ratios = Vec::new();
    for round in 0..=runs {
        let [before, after] = [read(plain)?, read(compressed)?];
        if round > 0 {
            println!("{round:<8}{before:>14.1}{after:>14.1}{:>8.2}", after / before);
            ratios.push(after / before);
        }
    }
    println!("median: LZ4/plain {:.2}", median(ratios));
    Ok(true)
}

fn measure() -> Result<bool, String> {
    let (husk, kernel) = (get("OVERHEAD_HUSK")?, get("OVERHEAD_KERNEL")?);
    let (initrd, image, memory) = (get("OVERHEAD_INITRD")?, get("OVERHEAD_IMAGE")?, get("OVERHEAD_MEMORY")?);
    let runs: usize = get("OVERHEAD_RUNS")?.parse().map_err(|_| "OVERHEAD_RUNS is not a number")?;
    let bare = ["boot", "--kernel", &kernel, "--memory", &memory, "--initrd", &initrd];
    let image = ["run", "--kernel", &kernel, "--memory", &memory, &image, "true"];
    let mut times: [Vec<f64>; 2] = Default::default();
    println!("{:<8}{:>14}{:>14}{:>8}", "round", "boot (ms)", "run (ms)", "ratio");
    // The first round prepares the image and warms the page cache. It is not counted.
    for round in 0..=runs {
        let [boot, run] = [time(&husk, &bare)?, time(&husk, &image)?];
        if round > 0 {
            println!("{round:<8}{boot:>14.1}{run:>14.1}{:>8.2}", run / boot);
            times[0].push(boot);
            times[1].push(run);
        }
    }
    // Ratios of adjacent runs, because most of the noise affects both.
    let ratio = median(times[0].iter().zip(&times[1]).map(|(boot, run)| run / boot).collect());
    let [boot, run] = times.map(median);
    println!("median: boot {boot:.1} ms, run {run:.1} ms, run/boot {ratio:.2} (target: below {RATIO_MAX})");
    let [image @ .., _] = image;
    let exec = exec_time(&husk, &image, runs)?;
    println!("median: exec of `true` in a running machine {exec:.1} ms, exec/run {:.2}", exec / run);
    Ok(ratio < RATIO_MAX)
}

/// Returns the milliseconds of `husk exec` in a running machine.
fn exec_time(husk: &str, image: &[&str], runs: usize) -> Result<f64, String> {
    let name = format!("overhead-{}", std::process::id());
    let mut start = image.to_vec();
    start.splice(1..1, ["-d", "--rm", "--name", &name]);
    start.extend(["sleep", "1000"]);
    time(husk, &start)?;
    let times: Result<Vec<f64>, String> = (0..=runs).map(|_| time(husk, &["exec", &name, "true"])).collect();
    time(husk, &["kill", &name])?;
    // The first one is not counted.
    Ok(median(times?.split_off(1)))
}

/// Returns the milliseconds from start to a successful exit.
fn time(husk: &str, words: &[&str]) -> Result<f64, String> {
    let start = Instant::now();
    output(husk, words)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Returns the standard output.
fn output(husk: &str, words: &[&str]) -> Result<String, String> {
    let output =
        Command::new(husk).args(words).stdin(Stdio::null()).output().map_err(|error| format!("{husk}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{words:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
