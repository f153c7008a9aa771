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
        NoiseLevel::TooNoisy => "The host was too noisy to conclude",
    };
    format!(
        "{verdict}: the same work, done before each round, differed by {} (the middle half’s width), and a hypervisor kept {} \
         of the processors’ time.",
        format::percent(noise.spread),
        format::percent(noise.stolen)
    )
}

/// Renders the section.
pub fn repeat(report: &Report) -> Markup {
    html! {
        section #repeat aria-labelledby="repeat-title" {
            h2 #repeat-title { "How to repeat it" }
            pre tabindex="0" { code { (format::command_line(&report.command_line)) } }
            p {
                "It took " (format::number(report.duration_s / 60.0)) " minutes. The image " code { (report.image.name) } " was "
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
        Isolation::None => "nothing between it and the host",
        Isolation::Container => "a container: namespaces and control groups on the host’s kernel",
        Isolation::Machine => "a machine: a kernel of its own",
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
        ("Processor", format!("{}, {} of them", host.processor, host.cpus)),
        ("Memory", format!("{} MiB", host.memory_mib)),
        ("Kernel", host.kernel.clone()),
        ("KVM", host.kvm.clone()),
        ("Itself a guest of", host.hypervisor.clone().unwrap_or_else(|| "nobody that can be seen".to_owned())),
        ("Governor", host.governor.clone().unwrap_or_else(none)),
        ("Clock", host.clocksource.clone()),
        ("Huge pages", host.huge_pages.clone().unwrap_or_else(none)),
        ("File system", host.file_system.clone()),
        ("Load before", format!("{:.2}", host.load)),
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
            "Contenders take turns, round by round, so that what disturbs the host disturbs all of them. After "
            (format::count(usize::try_from(method.warm_up_rounds).unwrap_or_default(), "round")) " that is not counted there are "
            (min) " to " (max) " rounds: no more once every interval’s half width is at most " (format::percent(method.precision))
            " of its median. All clocks are read on the host; a guest’s clock is never asked."
        }
        p {
            "An interval holds the true median in " (format::percent(method.confidence)) " of cases. It is a bootstrap: the samples are "
            "drawn anew from themselves, a thousand times, and the outer draws left out. Of fewer than six samples it is all of "
            "them. A ratio is the median of the ratios of the same rounds, with an interval made in the same way. An outlier lies "
            "further from the middle half than one and a half times its width; it is shown, and stays in. A failed run gives no number."
        }
        @if !method.amounts.is_empty() {
            p { "How much work a run did:" }
            ul.amounts { @for (metric, amount) in &method.amounts { li { code { (metric) } " " (amount) } } }
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
fn mebibytes(bytes: u64) -> String {
    format::number(bytes as f64 / f64::from(1 << 20))
}
