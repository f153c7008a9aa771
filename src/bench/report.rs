//! What `husk bench` found, as plain data: the table, the page, `--compare` and the JSON file are all made of it, and nothing else is.
//! docs/bench-schema.json is this file's schema, for other programs.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scenario::{Better, Scenario, Unit};

/// The version of the format; a file of another one is not read.
pub const VERSION: u32 = 2;

/// The schema of a [`Report`], as `docs/bench-schema.json` has it.
pub fn schema() -> String {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Report)).unwrap_or_default();
    text.push('\n');
    text
}

/// A whole run of `husk bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// husk's own version.
    pub husk: String,
    /// When it began, RFC 3339, UTC.
    pub started: String,
    /// How long it took.
    pub duration_s: f64,
    /// The command line that made it.
    pub command_line: Vec<String>,
    /// The image, as the user named it, and its digest.
    pub image: Image,
    /// What every instance was given.
    pub limits: Limits,
    /// Where it ran.
    pub host: Host,
    /// How steady the host was.
    pub noise: Noise,
    /// How numbers were taken.
    pub method: Method,
    /// Everyone who was looked for, whether present or not, in the order of the runs.
    pub contenders: Vec<ContenderInfo>,
    /// Every number, in the order of [`METRICS`](super::scenario::METRICS).
    pub metrics: Vec<MetricResults>,
    /// What all that says, in sentences; the first is the most important.
    pub verdict: Vec<String>,
}

impl Report {
    /// The report as the file has it.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("write what was found as JSON")?;
        text.push('\n');
        Ok(text)
    }

    /// Whether a round of anybody's failed.
    pub fn has_failures(&self) -> bool {
        self.metrics.iter().flat_map(|metric| &metric.results).any(|outcome| !outcome.failures.is_empty())
    }
}

/// The image that all contenders ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Image {
    /// As the user named it.
    pub name: String,
    /// Its digest, `sha256:…`.
    pub id: String,
    /// The size of its files.
    pub bytes: u64,
}

/// What every instance may use.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Processors, of which a fraction is time.
    pub cpus: f64,
    /// Memory: of the guest, or of the container.
    pub memory_mib: u64,
    /// The host's processors that everything is pinned to, as `0-2,4`.
    pub cpuset: Option<String>,
}

/// The host, as far as it matters to numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// The processor's name.
    pub processor: String,
    /// How many there are.
    pub cpus: u32,
    /// All of its memory.
    pub memory_mib: u64,
    /// What carries out KVM: `kvm_amd`, `kvm_intel`, `kvm_pvm`; `none` without.
    pub kvm: String,
    /// The hypervisor that the host is itself a guest of.
    pub hypervisor: Option<String>,
    /// cpufreq's governor, where there is one.
    pub governor: Option<String>,
    /// The clock that the kernel keeps time by.
    pub clocksource: String,
    /// Transparent huge pages: `always`, `madvise`, `never`.
    pub huge_pages: Option<String>,
    /// The file system that the bench's files were on.
    pub file_system: String,
    /// What the kernel does about each processor's fault, by the fault's name.
    pub mitigations: BTreeMap<String, String>,
    /// The load average of the last minute, before anything was run.
    pub load: f64,
}

/// How steady the host was: the same work, done by the bench itself before each round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Noise {
    /// What it took each time.
    pub samples_ms: Vec<f64>,
    /// The middle half's width as a share of the median.
    pub spread: f64,
    /// The time that a hypervisor kept from this host, as a share of all processors' time meanwhile.
    pub stolen: f64,
    /// What that means.
    pub verdict: NoiseLevel,
}

/// Whether numbers of such a host can be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseLevel {
    /// Differences beyond the intervals are real.
    Quiet,
    /// Small differences may be the host's.
    Noisy,
    /// Nothing can be concluded.
    TooNoisy,
}

/// How numbers were taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Method {
    /// Uncounted rounds before the others.
    pub warm_up_rounds: u32,
    /// Rounds at least and at most.
    pub rounds: (u32, u32),
    /// The half width of an interval, as a share of the median, at which no more rounds are needed.
    pub precision: f64,
    /// The share of cases in which an interval holds the true median.
    pub confidence: f64,
    /// What ratios are to: a contender's name.
    pub baseline: String,
    /// How much work each run of the work program did, by the measure's name.
    pub amounts: BTreeMap<String, u64>,
}

/// What separates an instance from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Nothing.
    None,
    /// Namespaces and control groups, on the host's kernel.
    Container,
    /// A kernel of its own.
    Machine,
}

/// One of those that are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ContenderInfo {
    /// As `--against` names it.
    pub name: String,
    /// What separates its instances from the host.
    pub isolation: Isolation,
    /// Its version, where it is present.
    pub version: Option<String>,
    /// The kernel that its instances run on, where it is not the host's.
    pub kernel: Option<String>,
    /// Why it took no part, where it did not.
    pub unavailable: Option<Unavailable>,
    /// The command line of an instance of it, word by word.
    pub command_line: Vec<String>,
    /// What a reader has to know to judge its numbers; a limit that it could not be given, first of all.
    pub notes: Vec<String>,
}

/// Why a contender took no part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unavailable {
    /// What is missing.
    pub reason: String,
    /// What to type to have it.
    pub install: Option<String>,
}

/// One number, of everyone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MetricResults {
    /// The name in [`METRICS`](super::scenario::METRICS).
    pub name: String,
    /// As a person reads it.
    pub title: String,
    /// The group that it belongs to.
    pub scenario: Scenario,
    /// What it counts.
    pub unit: Unit,
    /// Which of two is better.
    pub better: Better,
    /// Each contender's, in the order of the runs.
    pub results: Vec<Outcome>,
}

/// What one contender came to in one measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    /// The contender's name.
    pub contender: String,
    /// Every value, in the order of the rounds; a round that failed has none.
    pub samples: Vec<Option<f64>>,
    /// What failed, a line each, with the round.
    pub failures: Vec<String>,
    /// Why it was not measured at all, where it was not.
    pub skipped: Option<String>,
    /// What the samples say; none where too few succeeded.
    pub summary: Option<Summary>,
    /// The same in proportion to the baseline's, of the same rounds.
    pub ratio: Option<Estimate>,
}

/// What samples say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// The median, and where it may truly be.
    pub median: Estimate,
    /// The least of them.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// The rounds whose value stands apart from the others: beyond one and a half widths of the middle half.
    pub outliers: Vec<u32>,
}

/// A value, and the interval in which it may truly be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// The best guess.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
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
        // Debian's python3-jsonschema, a validator that shares no code with what made the schema.
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
