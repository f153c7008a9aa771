//! husk and other VMMs side by side: the same kernel and initial RAM disk, to PID 1 and to power-off, in turn.
//!
//! Times are wall-clock times of this process: from the start of a VMM to the first line of the guest's PID 1, and to
//! the exit of the VMM. `scripts/versus` runs it where KVM runs real kernels. In the lab's Intel machine the clock
//! advances by 1 ms per million instructions, so one run is enough; VM exits are counted as well.

mod exits;
mod restored;
mod table;
mod vmms;

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use exits::{Count, Exits};
use vmms::{Kind, Vmm};

/// The first line that the guest's init prints.
const PID1: &str = "pid1=up";
/// What all VMMs boot, from the environment of `scripts/versus`.
struct Parts {
    kernel: String,
    initrd: String,
    memory_mib: String,
    cpus: String,
    runs: usize,
    /// Whether the clock counts instructions.
    counted: bool,
}

/// One run of a VMM.
#[derive(Clone, Copy)]
struct Run {
    to_pid1: Duration,
    to_exit: Duration,
}

/// What was measured of a VMM.
#[derive(Default)]
struct Results {
    runs: Vec<Run>,
    /// The VM exits of one run, if they were counted.
    exits: Option<Exits>,
}

impl Results {
    /// The median of a part of a run, in milliseconds, or in millions of instructions.
    fn median(&self, part: Part) -> f64 {
        median(self.runs.iter().map(|run| millis(part(run))).collect())
    }
}

/// A duration of a run.
type Part = fn(&Run) -> Duration;

/// All of them, in order.
const PARTS: [(&str, Part); 2] = [("to PID 1", |run| run.to_pid1), ("to exit", |run| run.to_exit)];

fn main() -> ExitCode {
    let measured = parts().and_then(|parts| {
        let vmms = vmms::all(&parts)?;
        compare(&parts, &vmms)
    });
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::from(2)
        }
    }
}

/// Boots all VMMs in turn, prints a table, and returns whether husk was the fastest.
fn compare(parts: &Parts, vmms: &[Vmm]) -> Result<bool, String> {
    let mut results: Vec<Results> = vmms.iter().map(|_| Results::default()).collect();
    // The first round warms the page cache for all. It is not measured, but its VM exits are counted, because counting
    // takes time.
    for round in 0..=parts.runs {
        for (vmm, results) in vmms.iter().zip(&mut results) {
            let count = (round == 0 && parts.counted).then(Count::start).transpose()?;
            let run = measure(vmm).map_err(|error| format!("{}: {error}", vmm.name))?;
            if let Some(count) = count {
                results.exits = Some(count.finish()?);
            }
            if round > 0 {
                eprintln!("{:<18}{round:>4}{:>12.1}{:>12.1}", vmm.name, millis(run.to_pid1), millis(run.to_exit));
                results.runs.push(run);
            }
        }
    }
    print!("{}", table::table(parts.counted, vmms, &results));
    Ok(report(vmms, &results))
}

fn setting(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; scripts/versus sets it and runs this"))
}

fn parts() -> Result<Parts, String> {
    Ok(Parts {
        kernel: setting("VERSUS_KERNEL")?,
        initrd: setting("VERSUS_INITRD")?,
        memory_mib: setting("VERSUS_MEMORY_MIB")?,
        cpus: setting("VERSUS_CPUS")?,
        runs: setting("VERSUS_RUNS")?.parse().map_err(|_| "VERSUS_RUNS is no number")?,
        counted: std::env::var_os("VERSUS_COUNTED").is_some(),
    })
}

/// Runs a VMM to its end. Fails if the guest does not reach PID 1 or does not end.
fn measure(vmm: &Vmm) -> Result<Run, String> {
    let [program, arguments @ ..] = &*vmm.command else { return Err("no program".to_owned()) };
    let start = Instant::now();
    let (stdin, typed) = vmm.answers.as_ref().map_or(Ok((Stdio::null(), None)), restored::Answers::input)?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    if let Some(request) = vmm.answers.as_ref().and_then(|answers| answers.request.as_ref()) {
        request.send()?;
    }
    let mut to_pid1 = None;
    let mut printed = String::new();
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        if line.trim() == PID1 {
            to_pid1.get_or_insert_with(|| start.elapsed());
        }
        printed.push_str(&line);
        printed.push('\n');
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let to_exit = start.elapsed();
    drop(typed);
    match to_pid1 {
        Some(to_pid1) if status.success() => Ok(Run { to_pid1, to_exit }),
        _ => Err(format!("exited with {status} and printed:\n{printed}")),
    }
}

/// Prints husk's shares by the median ratio of adjacent runs, because most of the noise affects both. Returns whether husk
/// was the fastest to boot.
fn report(vmms: &[Vmm], results: &[Results]) -> bool {
    let mut faster = true;
    for kind in [Kind::Boot, Kind::Restore] {
        let mut rows = vmms.iter().zip(results).filter(|(vmm, _)| vmm.kind == kind);
        let Some((husk, ours)) = rows.next() else { continue };
        for (name, part) in PARTS {
            for (vmm, theirs) in rows.clone() {
                let pairs = ours.runs.iter().zip(&theirs.runs);
                let ratio = median(pairs.map(|(h, o)| part(h).as_secs_f64() / part(o).as_secs_f64()).collect());
                println!("{name}, {}'s share of {}: {ratio:.2}", husk.name, vmm.name);
                faster &= kind != Kind::Boot || ratio < 1.0;
            }
        }
    }
    println!("husk is {}", if faster { "the fastest" } else { "not the fastest" });
    faster
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
