//! Measurements of husk: each prints a name, a value and its unit, and the target if there is one.
//!
//! `cargo bench --bench measure [NAME…]` runs those whose name contains one of the words. Measurements that are
//! compared take turns, since only ratios within one run are portable between machines.

mod background;
mod disk;
mod exits;
mod image;
mod lifetime;
mod memory;
mod pages;
mod parse;
mod peer;
mod restored_pages;
mod sandbox;
mod snapshot;
mod startup;
mod wakeup;

use std::fmt::Write as _;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

/// The target of a value.
enum Target {
    Below(f64),
    Above(f64),
    None,
}

/// Prints one line of the table.
fn report(name: &str, value: f64, unit: &str, target: Target) {
    let mut line = format!("{name:<52}{value:>12.3} {unit:<6}");
    let verdict = |met| if met { "met" } else { "MISSED" };
    let target = match target {
        Target::Below(limit) => write!(line, " below {limit:<8}{}", verdict(value < limit)),
        Target::Above(limit) => write!(line, " above {limit:<8}{}", verdict(value > limit)),
        Target::None => Ok(()),
    };
    target.expect("a string takes all that is written to it");
    println!("{}", line.trim_end());
}

/// Returns the median.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Builds a `husk boot` command of a tiny guest with a kernel command line.
fn boot(guest: &str, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
    command.args(["boot", "--kernel", guest, "--cmdline", words]);
    command
}

/// Runs a command and returns the guest's output. Fails on a nonzero exit code.
fn output_of(mut command: Command) -> Result<String> {
    let output = command.output().context("start husk")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {stdout}{stderr}", output.status);
    Ok(stdout.into_owned())
}

/// The name used for selection, and the function.
type Measurement = (&'static str, fn() -> Result<()>);

fn main() -> ExitCode {
    let measurements: [Measurement; 14] = [
        ("lifetime", lifetime::tiny_guest),
        ("sandbox-starts", sandbox::starts),
        ("sandbox-throughput", sandbox::throughput),
        ("startup", startup::first_run),
        ("kernel", startup::kernel_load),
        ("exits", exits::round_trips),
        ("parse", parse::block_requests),
        ("disk", disk::block_device),
        ("memory", memory::overhead),
        ("idle", memory::idle),
        ("background", background::machines),
        ("snapshot", snapshot::machines),
        ("restored-pages", restored_pages::ways),
        ("image", image::prepare),
    ];
    // Cargo passes `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let chosen = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    println!("{:<52}{:>12} {:<6} target", "measurement", "value", "unit");
    let mut code = ExitCode::SUCCESS;
    for (name, measure) in measurements.into_iter().filter(|(name, _)| chosen(name)) {
        if let Err(error) = measure() {
            eprintln!("{name}: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    code
}
