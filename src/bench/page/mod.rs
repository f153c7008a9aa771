//! A report as a single self-contained HTML page, without scripts, fonts or external resources.
//!
//! The verdict comes first, then missing results, ratios, samples, numbers, and how to reproduce the run. The template
//! language (maud) escapes all text; the content security policy is a second line of defense.

mod details;
mod plot;
mod tables;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::format;
use super::report::Report;

const STYLE: &str = include_str!("style.css");
/// Forbids scripts and external resources; only the inline style is allowed.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
/// Characters to escape in a `data:` URL (RFC 3986 §2).
const URL: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':').remove(b',');

/// Renders the page.
pub fn page(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content={ "husk " (report.husk) };
                title { "husk bench: " (report.image.name) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "What a machine costs on this host" }
                    p.sub {
                        code { (report.image.name) } ", " (details::limits(report)) ", on " (report.host.processor) ", "
                        time datetime=(report.started) { (report.started) } "."
                    }
                    (contents())
                }
                main {
                    (verdict(report))
                    (tables::missing(report))
                    (tables::ratios(report))
                    (distributions(report))
                    (tables::numbers(report))
                    (details::repeat(report))
                }
                footer { p { "Made by husk " (report.husk) ". This page loads nothing from elsewhere." } }
            }
        }
    };
    page.into_string()
}

fn contents() -> Markup {
    let sections = [
        ("verdict", "Verdict"),
        ("missing", "Missing"),
        ("ratios", "Ratios"),
        ("samples", "Samples"),
        ("numbers", "Numbers"),
        ("repeat", "How to repeat it"),
    ];
    html! {
        nav aria-label="Contents" {
            ul { @for (id, title) in sections { li { a href={ "#" (id) } { (title) } } } }
        }
    }
}

fn verdict(report: &Report) -> Markup {
    html! {
        section #verdict aria-labelledby="verdict-title" {
            h2 #verdict-title { "Verdict" }
            @match report.verdict.split_first() {
                None => p { "There is nobody to compare with." },
                Some((first, rest)) => {
                    p.lead { (first) }
                    ul { @for sentence in rest { li { (sentence) } } }
                }
            }
            p.note {
                "“Better” and “worse” are said only where the whole interval lies beyond what this host differs by on its own. "
                (details::noise(report))
            }
        }
    }
}

fn distributions(report: &Report) -> Markup {
    html! {
        section #samples aria-labelledby="samples-title" {
            h2 #samples-title { "Every sample" }
            p {
                "Each mark is one run; hollow marks are outliers. Below them, the triangle points to the median, and the bar is where the "
                "true median lies in " (format::percent(report.method.confidence)) " of cases. "
                "Where contenders are far apart, the axis is logarithmic, and a second one beside it shows each of them from near: how "
                "far its runs are from its own median."
            }
            @for (scenario, metrics) in format::groups(report) {
                h3 { (format::scenario(scenario)) }
                div.plots { @for metric in metrics { (plot::figure(report, metric)) } }
            }
        }
    }
}

/// Renders a download link with the report as a `data:` URL.
fn download(report: &Report) -> Markup {
    let json = serde_json::to_string(report).unwrap_or_default();
    html! {
        p {
            a.button download="husk-bench.json" href={ "data:application/json," (utf8_percent_encode(&json, URL)) } {
                "Save the numbers as JSON"
            }
            " for " code { "husk bench --compare" } " or another program."
        }
    }
}

/// Renders the marker of a contender. The eight shapes are distinguishable without color, and the colors are suitable
/// for color-blind readers (Okabe and Ito 2008).
fn badge(report: &Report, contender: &str) -> Markup {
    let index = index_of(report, contender);
    html! {
        svg.badge viewBox="1.5 1.5 7 7" width="10" height="10" aria-hidden="true" {
            path.(color_class(index)) d=(plot::shape(index, 5.0, 5.0)) {}
        }
    }
}

fn index_of(report: &Report, contender: &str) -> usize {
    format::present(report).iter().position(|name| *name == contender).unwrap_or_default()
}

/// Returns the CSS class of a contender's color.
fn color_class(index: usize) -> &'static str {
    const CLASSES: [&str; 8] = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];
    CLASSES.get(index % CLASSES.len()).copied().unwrap_or("c0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::example;

    #[test]
    fn text_of_a_report_is_text_on_the_page() {
        let mut report = example::report();
        for contender in &mut report.contenders {
            contender.notes.push("</p><script>alert(1)</script>".to_owned());
        }
        report.verdict.push("<img src=http://example.com/>".to_owned());
        report.image.name = "\"><script>".to_owned();
        let page = page(&report);
        for tag in ["<script", "<img", "<b "] {
            assert!(!page.contains(tag), "{tag}");
        }
        assert!(page.contains("husk &lt;b onclick=&quot;alert('&amp;')&quot;&gt;stock&lt;/b&gt;"));
    }

    #[test]
    fn the_page_carries_the_report() {
        let report = example::report();
        let page = page(&report);
        let (_, link) = page.split_once("href=\"data:application/json,").unwrap();
        let (json, _) = link.split_once('"').unwrap();
        let json = json.replace("&amp;", "&");
        let json = percent_encoding::percent_decode_str(&json).decode_utf8().unwrap();
        assert_eq!(crate::bench::compare::parse(&json).unwrap(), report);
    }

    #[test]
    fn an_empty_report_makes_a_page() {
        let mut report = example::report();
        report.contenders.clear();
        report.metrics.clear();
        report.verdict.clear();
        assert!(page(&report).contains("There is nobody to compare with."));
    }

    #[test]
    fn a_page_is_of_a_size_to_send() {
        let bytes = page(&example::report()).len();
        assert!(bytes < 1 << 20, "{bytes}");
    }
}
