//! The results of `husk bench` as plain data. The table, the page, `--compare` and the JSON file are all made from this
//! alone. `docs/bench-schema.json` is the published schema.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scenario::{Better, Scenario, Unit};

/// The version of the format. Files of other versions are rejected.
pub const VERSION: u32 = 2;

/// Returns the schema of a [`Report`], as in `docs/bench-schema.json`.
pub fn schema() -> String {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Report)).unwrap_or_default();
    text.push('\n');
    text
}

/// The results of one run of `husk bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The version of the format.
    pub version: u32,
    /// The version of husk.
    pub husk: String,
    /// The start time, RFC 3339, UTC.
    pub started: String,
    /// The duration of the run.
    pub duration_s: f64,
    /// The command line of the run.
    pub command_line: Vec<String>,
    /// The image that all contenders ran.
    pub image: Image,
    /// The limits of every instance.
    pub limits: Limits,
    /// The host.
    pub host: Host,
    /// The noise of the host.
    pub noise: Noise,
    /// How the samples were taken.
    pub method: Method,
    /// All known contenders, available or not, in execution order.
    pub contenders: Vec<ContenderInfo>,
    /// The results by metric, in the order of [`METRICS`](super::scenario::METRICS).
    pub metrics: Vec<MetricResults>,
    /// The conclusions in sentences; the most important one comes first.
    pub verdict: Vec<String>,
}

impl Report {
    /// Returns the report as JSON.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("serialize the report")?;
        text.push('\n');
        Ok(text)
    }

    /// Whether any round of any contender failed.
    pub fn has_failures(&self) -> bool {
        self.metrics.iter().flat_map(|metric| &metric.results).any(|outcome| !outcome.failures.is_empty())
    }

    /// Returns the names of the available contenders, in order.
    pub fn available(&self) -> Vec<&str> {
        let available = self.contenders.iter().filter(|contender| contender.unavailable.is_none());
        available.map(|contender| contender.name.as_str()).collect()
    }

    /// Returns the metrics grouped by scenario.
    pub fn groups(&self) -> Vec<(Scenario, Vec<&MetricResults>)> {
        let mut groups: Vec<(Scenario, Vec<&MetricResults>)> = Vec::new();
        for metric in &self.metrics {
            match groups.iter_mut().find(|(scenario, _)| *scenario == metric.scenario) {
                Some((_, metrics)) => metrics.push(metric),
                None => groups.push((metric.scenario, vec![metric])),
            }
        }
        groups
    }

    /// Returns skipped contenders and reasons, with the titles of the affected metrics.
    pub fn skipped(&self) -> Vec<(String, Vec<&str>)> {
        let mut skipped: Vec<(String, Vec<&str>)> = Vec::new();
        for metric in &self.metrics {
            for outcome in &metric.results {
                let Some(reason) = &outcome.skipped else { continue };
                let contender = format!("{}: {reason}", outcome.contender);
                match skipped.iter_mut().find(|(same, _)| *same == contender) {
                    Some((_, titles)) => titles.push(&metric.title),
                    None => skipped.push((contender, vec![&metric.title])),
                }
            }
        }
        skipped
    }
}

/// The image that all contenders ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Image {
    /// The name given by the user.
    pub name: String,
    /// The digest, `sha256:…`.
    pub id: String,
    /// The total size of its files.
    pub bytes: u64,
}

/// The resource limits of an instance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// CPUs; a fraction limits CPU time.
    pub cpus: f64,
    /// The memory of the guest or container.
    pub memory_mib: u64,
    /// The host's CPUs that everything is pinned to, such as `0-2,4`.
    pub cpuset: Option<String>,
}

/// Properties of the host that affect results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// The model name of the processor.
    pub processor: String,
    /// The number of CPUs.
    pub cpus: u32,
    /// The total memory.
    pub memory_mib: u64,
    /// The KVM module: `kvm_amd`, `kvm_intel` or `kvm_pvm`, otherwise `none`.
    pub kvm: String,
    /// The hypervisor, if the host is itself a virtual machine.
    pub hypervisor: Option<String>,
    /// The emulator, if the host's processor is emulated by software: `QEMU TCG` or `Bochs`.
    #[serde(default)]
    pub emulator: Option<String>,
    /// The cpufreq governor, if any.
    pub governor: Option<String>,
    /// The kernel's clock source.
    pub clocksource: String,
    /// Transparent huge pages: `always`, `madvise`, `never`.
    pub huge_pages: Option<String>,
    /// The file system of the work directory.
    pub file_system: String,
    /// The kernel's mitigations by CPU vulnerability.
    pub mitigations: BTreeMap<String, String>,
    /// The one-minute load average before the first round.
    pub load: f64,
}

/// The noise of the host: a fixed amount of reference work, done before each round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Noise {
    /// The duration of the reference work, by round.
    pub samples_ms: Vec<f64>,
    /// The interquartile range as a fraction of the median.
    pub spread: f64,
    /// The fraction of CPU time that a hypervisor took from this host (steal time).
    pub stolen: f64,
    /// The conclusion.
    pub verdict: NoiseLevel,
}

/// How noisy a host was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseLevel {
    /// Differences beyond the intervals are real.
    Quiet,
    /// Small differences may be noise.
    Noisy,
    /// No conclusions are possible.
    TooNoisy,
}

/// How the samples were taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Method {
    /// Warm-up rounds, which are not counted.
    pub warm_up_rounds: u32,
    /// The minimum and maximum number of rounds.
    pub rounds: (u32, u32),
    /// The relative half-width of the interval at which sampling stops.
    pub precision: f64,
    /// The confidence level of intervals.
    pub confidence: f64,
    /// The contender that ratios refer to.
    pub baseline: String,
    /// The calibrated amount of work per sample, by metric name.
    pub amounts: BTreeMap<String, u64>,
}

/// How an instance is isolated from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Not isolated.
    None,
    /// Namespaces and control groups on the host's kernel.
    Container,
    /// A virtual machine with its own kernel.
    Machine,
}

/// A contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ContenderInfo {
    /// The name used by `--contenders`.
    pub name: String,
    /// How its instances are isolated from the host.
    pub isolation: Isolation,
    /// The version, if available.
    pub version: Option<String>,
    /// The kernel of its instances, if it is not the host's.
    pub kernel: Option<String>,
    /// Why it is unavailable, if so.
    pub unavailable: Option<Unavailable>,
    /// An example command line of an instance.
    pub command_line: Vec<String>,
    /// Remarks on its results, above all limits that are not enforced.
    pub notes: Vec<String>,
}

/// Why a contender is unavailable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unavailable {
    /// The reason.
    pub reason: String,
    /// How to make it available.
    pub install: Option<String>,
}

/// The results of all contenders for one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MetricResults {
    /// The name in [`METRICS`](super::scenario::METRICS).
    pub name: String,
    /// The title shown to users.
    pub title: String,
    /// The scenario that the metric belongs to.
    pub scenario: Scenario,
    /// The unit of the values.
    pub unit: Unit,
    /// Whether lower or higher values are better.
    pub better: Better,
    /// One outcome per contender, in execution order.
    pub results: Vec<Outcome>,
}

impl MetricResults {
    /// Returns the unit and which values are better: `ms, lower is better`.
    pub fn direction(&self) -> String {
        match self.unit.symbol() {
            "" => self.better.phrase().to_owned(),
            symbol => format!("{symbol}, {}", self.better.phrase()),
        }
    }

    /// Returns the outcome of one contender.
    pub fn outcome_of(&self, contender: &str) -> Option<&Outcome> {
        self.results.iter().find(|outcome| outcome.contender == contender)
    }
}

/// The outcome of one contender for one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    /// The name of the contender.
    pub contender: String,
    /// The values by round; failed rounds have none.
    pub samples: Vec<Option<f64>>,
    /// The failures, each with its round.
    pub failures: Vec<String>,
    /// Why the metric was skipped, if so.
    pub skipped: Option<String>,
    /// Summary statistics; none if too few rounds succeeded.
    pub summary: Option<Summary>,
    /// The ratio to the baseline, paired by round.
    pub ratio: Option<Estimate>,
}

/// Summary statistics of the samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// The median with its confidence interval.
    pub median: Estimate,
    /// The minimum.
    pub min: f64,
    /// The maximum.
    pub max: f64,
    /// The rounds of outliers, which are more than 1.5 interquartile ranges outside of the quartiles.
    pub outliers: Vec<u32>,
}

/// An estimate with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// The point estimate.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::bench::example;

    const PUBLISHED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/bench-schema.json");

    #[test]
    fn the_published_schema_is_this_one() {
        let published = std::fs::read_to_string(PUBLISHED).unwrap_or_default();
        assert!(published == schema(), "to mend it: husk bench --schema > docs/bench-schema.json");
    }

    #[test]
    fn a_report_has_the_published_schema() {
        // Debian's python3-jsonschema, a validator independent of the generator.
        let check = "import json, sys, jsonschema
schema = json.load(open(sys.argv[1]))
jsonschema.validators.validator_for(schema).check_schema(schema)
report = json.load(sys.stdin)
jsonschema.validate(report, schema)
for broken in ({**report, 'version': 'one'}, {**report, 'metrics': None}, {**report, 'limits': {}}):
    try:
        jsonschema.validate(broken, schema)
        sys.exit('what is no report has the schema')
    except jsonschema.ValidationError:
        pass";
        let has_validator =
            Command::new("/usr/bin/python3").args(["-c", "import jsonschema"]).stderr(Stdio::null()).status();
        if !has_validator.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: a_report_has_the_published_schema: there is no jsonschema for /usr/bin/python3");
            return;
        }
        let report = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(report.path(), serde_json::to_string(&example::report()).unwrap()).unwrap();
        let python = Command::new("/usr/bin/python3")
            .args(["-c", check, PUBLISHED])
            .stdin(report.reopen().unwrap())
            .output()
            .unwrap();
        assert!(python.status.success(), "{}", String::from_utf8_lossy(&python.stderr));
    }
}
