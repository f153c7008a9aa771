//! A synthetic report that uses every feature of the format; for tests, `fuzz/` and work on the page.

use std::sync::OnceLock;

use super::report::{
    ContenderInfo, Host, Image, Isolation, Limits, Method, MetricResults, Noise, NoiseLevel, Outcome, Report,
    Unavailable, VERSION,
};
use super::scenario::{METRICS, Metric, Scenario, Unit};
use super::statistics;

/// The contenders with the factors by which they are slower than the host: for CPU work, for kernel work and to start.
const PRESENT: &[(&str, Isolation, [f64; 3])] = &[
    ("host", Isolation::None, [1.0, 1.0, 1.0]),
    ("crun", Isolation::Container, [1.0, 1.08, 14.0]),
    ("runc", Isolation::Container, [1.0, 1.09, 31.0]),
    ("podman (rootless), which has a rather long name", Isolation::Container, [1.01, 1.15, 160.0]),
    ("qemu-microvm", Isolation::Machine, [1.04, 0.81, 140.0]),
    ("husk", Isolation::Machine, [1.03, 0.80, 19.0]),
    ("husk <b onclick=\"alert('&')\">stock</b>", Isolation::Machine, [1.03, 1.4, 95.0]),
];
const ROUNDS: u32 = 20;

/// Returns the example report. It is always the same and includes summaries and ratios.
pub fn report() -> Report {
    static REPORT: OnceLock<Report> = OnceLock::new();
    REPORT.get_or_init(|| report_of(1, 1.0)).clone()
}

/// Returns a report with random samples from `seed`, in which husk's times are `slower` times as long.
pub fn report_of(seed: u64, slower: f64) -> Report {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut report = Report {
        version: VERSION,
        husk: env!("CARGO_PKG_VERSION").to_owned(),
        started: "2026-01-02T03:04:05Z".to_owned(),
        duration_s: 1234.5,
        command_line: words("husk bench alpine:3.22 --against crun,runc,podman,qemu-microvm --output bench.html"),
        image: Image {
            name: "alpine:3.22".to_owned(),
            id: format!("sha256:{}", "0123456789abcdef".repeat(4)),
            bytes: 8_300_000,
        },
        limits: Limits { cpus: 2.0, memory_mib: 512, cpuset: Some("2-3".to_owned()) },
        host: host(),
        noise: noise(&mut random),
        method: Method {
            warm_up_rounds: 1,
            rounds: (10, ROUNDS),
            precision: 0.02,
            confidence: statistics::CONFIDENCE,
            baseline: "crun".to_owned(),
            amounts: [("cpu-integer", 200_000_000), ("syscall", 1_000_000), ("fork", 500)]
                .map(|(name, amount)| (name.to_owned(), amount))
                .into(),
        },
        contenders: contenders(),
        metrics: METRICS
            .iter()
            .filter(|metric| metric.scenario != Scenario::Command)
            .map(|metric| measured(metric, slower, &mut random))
            .collect(),
        verdict: Vec::new(),
    };
    statistics::summarize(&mut report);
    report.verdict = super::verdict::sentences(&report);
    report
}

/// Draws from the standard normal distribution (Box and Muller 1958).
pub fn normal(random: &mut fastrand::Rng) -> f64 {
    (-2.0 * (1.0 - random.f64()).ln()).sqrt() * (std::f64::consts::TAU * random.f64()).cos()
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

fn host() -> Host {
    let mitigations = [
        ("meltdown", "Not affected"),
        ("mds", "Mitigation: Clear CPU buffers; SMT vulnerable"),
        (
            "spectre_v2",
            "Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; STIBP: always-on; PBRSB-eIBRS: Not affected",
        ),
        ("spec_store_bypass", "Mitigation: Speculative Store Bypass disabled via prctl"),
    ];
    Host {
        kernel: "6.12.8-amd64".to_owned(),
        processor: "AMD EPYC 7313P 16-Core Processor".to_owned(),
        cpus: 4,
        memory_mib: 16_384,
        kvm: "kvm_amd".to_owned(),
        hypervisor: Some("KVM".to_owned()),
        emulator: None,
        governor: None,
        clocksource: "tsc".to_owned(),
        huge_pages: Some("madvise".to_owned()),
        file_system: "ext4".to_owned(),
        mitigations: mitigations.map(|(fault, what)| (fault.to_owned(), what.to_owned())).into(),
        load: 0.12,
    }
}

fn noise(random: &mut fastrand::Rng) -> Noise {
    let samples_ms: Vec<f64> = (0..ROUNDS).map(|_| 80.0 * (1.0 + 0.01 * normal(random).abs())).collect();
    let spread = statistics::spread(&samples_ms);
    Noise { samples_ms, spread, stolen: 0.002, verdict: NoiseLevel::Quiet }
}

fn contenders() -> Vec<ContenderInfo> {
    let mut contenders: Vec<ContenderInfo> = PRESENT
        .iter()
        .map(|(name, isolation, _)| ContenderInfo {
            name: (*name).to_owned(),
            isolation: *isolation,
            version: Some("1.2.3-4+deb13u1".to_owned()),
            kernel: (*isolation == Isolation::Machine).then(|| "6.12.8-husk".to_owned()),
            unavailable: None,
            command_line: words(
                "run --cgroup-manager disabled --bundle /var/tmp/husk-bench/bundle-of-a-rather-long-name instance-17",
            ),
            notes: if *name == "host" { vec!["The host has no limit of memory.".to_owned()] } else { Vec::new() },
        })
        .collect();
    let unavailable = |name: &str, reason: &str, install: Option<&str>| ContenderInfo {
        name: name.to_owned(),
        isolation: Isolation::Machine,
        version: None,
        kernel: None,
        unavailable: Some(Unavailable { reason: reason.to_owned(), install: install.map(str::to_owned) }),
        command_line: Vec::new(),
        notes: Vec::new(),
    };
    contenders.push(unavailable("bubblewrap", "there is no bwrap on the path", Some("apt-get install bubblewrap")));
    contenders.push(unavailable("firecracker", "there is no firecracker on the path", None));
    contenders
}

fn measured(metric: &Metric, slower: f64, random: &mut fastrand::Rng) -> MetricResults {
    MetricResults {
        name: metric.name.to_owned(),
        title: metric.title.to_owned(),
        scenario: metric.scenario,
        unit: metric.unit,
        better: metric.better(),
        results: PRESENT.iter().map(|(name, _, costs)| outcome(name, *costs, metric, slower, random)).collect(),
    }
}

fn outcome(name: &str, costs: [f64; 3], metric: &Metric, slower: f64, random: &mut fastrand::Rng) -> Outcome {
    let mut outcome = Outcome {
        contender: name.to_owned(),
        samples: Vec::new(),
        failures: Vec::new(),
        skipped: None,
        summary: None,
        ratio: None,
    };
    if name == "host" && matches!(metric.scenario, Scenario::Network | Scenario::Density) {
        outcome.skipped = Some("the host has no instances".to_owned());
        return outcome;
    }
    let [own_work, kernel_work, start] = costs;
    let cost = match metric.scenario {
        Scenario::Start | Scenario::Memory | Scenario::Density => start,
        Scenario::Cpu | Scenario::MemoryBandwidth | Scenario::Command => own_work,
        _ => kernel_work,
    } * if name == "husk" { slower } else { 1.0 };
    let (first, is_rate) = match metric.unit {
        Unit::Milliseconds => (1.7, false),
        Unit::Nanoseconds => (3.2, false),
        Unit::Microseconds => (61.0, false),
        Unit::Mib => (0.4, false),
        Unit::MibPerSecond => (2_900.0, true),
        Unit::PerSecond => (123_000.0, true),
        Unit::Count => (600.0, true),
    };
    for round in 0..ROUNDS {
        if name == "qemu-microvm" && (metric.scenario == Scenario::Fork || metric.name == "exec" && round % 8 == 3) {
            outcome.failures.push(format!("round {round}: exit code 137 <killed> & no mark came"));
            outcome.samples.push(None);
            continue;
        }
        let tail = if random.u8(..) < 12 { 1.5 } else { 1.0 };
        let time = cost * tail * (0.03 * normal(random)).exp();
        outcome.samples.push(Some(if is_rate { first / time } else { first * time }));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_covers_all_parts_of_a_report() {
        let report = report();
        let outcomes: Vec<&Outcome> = report.metrics.iter().flat_map(|metric| &metric.results).collect();
        assert!(outcomes.iter().any(|outcome| outcome.skipped.is_some()));
        assert!(outcomes.iter().any(|outcome| !outcome.failures.is_empty() && outcome.summary.is_none()));
        assert!(outcomes.iter().any(|outcome| !outcome.failures.is_empty() && outcome.summary.is_some()));
        assert!(
            outcomes.iter().any(|outcome| outcome.summary.as_ref().is_some_and(|summary| !summary.outliers.is_empty()))
        );
        assert!(report.contenders.iter().any(|contender| contender.unavailable.is_some()));
        assert_eq!(report, report_of(1, 1.0));
    }
}
