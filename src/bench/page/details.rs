//! How to reproduce a run: command line, contenders, host and method.

use maud::{Markup, html};

use super::super::format;
use super::super::report::{ContenderInfo, Isolation, NoiseLevel, Report};
use super::badge;

/// Describes the limits of an instance.
pub fn limits(report: &Report) -> String {
    let limits = &report.limits;
    let pinned = limits.cpuset.as_ref().map(|cpuset| format!(", pinned to {cpuset}")).unwrap_or_default();
    let processors = if limits.cpus == 1.0 { "processor" } else { "processors" };
    format!("{} {processors}{pinned} and {} MiB of memory each", limits.cpus, limits.memory_mib)
}

/// Describes the noise of the host.
pub fn noise(report: &Report) -> String {
    let noise = &report.noise;
    let verdict = match noise.verdict {
        NoiseLevel::Quiet => "The host was quiet",
        NoiseLevel::Noisy => "The host was noisy",
        NoiseLevel::TooNoisy => "The host was too noisy for conclusions",
    };
    format!(
        "{verdict}: the reference work before each round varied by {} (interquartile range), and steal time was {}.",
        format::percent(noise.spread),
        format::percent(noise.stolen)
    )
}

/// Renders the section.
pub fn reproduce(report: &Report) -> Markup {
    html! {
        section #reproduce aria-labelledby="reproduce-title" {
            h2 #reproduce-title { "How to reproduce it" }
            pre tabindex="0" { code { (format::command_line(&report.command_line)) } }
            p {
                "The run took " (format::number(report.duration_s / 60.0)) " minutes. The image " code { (report.image.name) } " was "
                code { (report.image.id) } ", " (mebibytes(report.image.bytes)) " MiB of files."
            }
            h3 { "Contenders" }
            @for contender in report.contenders.iter().filter(|contender| contender.unavailable.is_none()) {
                (about(report, contender))
            }
            h3 { "Host" }
            (host(report))
            h3 { "Method" }
            (method(report))
        }
    }
}

fn about(report: &Report, contender: &ContenderInfo) -> Markup {
    let isolation = match contender.isolation {
        Isolation::None => "not isolated from the host",
        Isolation::Container => "a container: namespaces and control groups on the host’s kernel",
        Isolation::Machine => "a virtual machine with its own kernel",
    };
    html! {
        div.contender {
            h4 { (badge(report, &contender.name)) " " (contender.name) }
            p {
                (isolation)
                @if let Some(version) = &contender.version { "; version " (version) }
                @if let Some(kernel) = &contender.kernel { "; kernel " (kernel) }
                "."
            }
            @for note in &contender.notes { p.note { (note) } }
            @if !contender.command_line.is_empty() {
                pre tabindex="0" { code { (format::command_line(&contender.command_line)) } }
            }
        }
    }
}

fn host(report: &Report) -> Markup {
    let host = &report.host;
    let none = || "none".to_owned();
    let facts = [
        ("Processor", format!("{}, {} CPUs", host.processor, host.cpus)),
        ("Memory", format!("{} MiB", host.memory_mib)),
        ("Kernel", host.kernel.clone()),
        ("KVM", host.kvm.clone()),
        ("Hypervisor", host.hypervisor.clone().unwrap_or_else(|| "none detected".to_owned())),
        ("Emulator", host.emulator.clone().unwrap_or_else(none)),
        ("CPU governor", host.governor.clone().unwrap_or_else(none)),
        ("Clock source", host.clocksource.clone()),
        ("Huge pages", host.huge_pages.clone().unwrap_or_else(none)),
        ("File system", host.file_system.clone()),
        ("Load before the run", format!("{:.2}", host.load)),
    ];
    html! {
        table.facts {
            @for (name, value) in facts { tr { th scope="row" { (name) } td { (value) } } }
            @for (fault, mitigation) in &host.mitigations {
                tr { th scope="row" { "Mitigation: " (fault) } td { (mitigation) } }
            }
        }
    }
}

fn method(report: &Report) -> Markup {
    let method = &report.method;
    let (min, max) = method.rounds;
    html! {
        p {
            "Contenders take turns within a round, so that disturbances of the host affect all of them. After "
            (format::count(usize::try_from(method.warm_up_rounds).unwrap_or_default(), "warm-up round")) " there are " (min) " to "
            (max) " rounds; sampling stops once the half-width of every interval is at most " (format::percent(method.precision))
            " of its median. All times are measured on the host; the clock of a guest is never used."
        }
        p {
            "Intervals are " (format::percent(method.confidence)) " confidence intervals of the median, by bootstrapping with a "
            "thousand resamples; with fewer than six samples, they are the range of the samples. A ratio is the median of the "
            "ratios of each round, with an interval computed in the same way. Outliers are more than 1.5 interquartile ranges "
            "outside of the quartiles; they are marked, but not removed. A failed round yields no sample."
        }
        @if !method.amounts.is_empty() {
            p { "Amount of work per sample:" }
            ul.amounts { @for (metric, amount) in &method.amounts { li { code { (metric) } " " (amount) } } }
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
fn mebibytes(bytes: u64) -> String {
    format::number(bytes as f64 / f64::from(1 << 20))
}
