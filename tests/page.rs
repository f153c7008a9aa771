//! The page of `husk bench` in a real browser, Debian's Chromium: narrow, dark, printed, and offline.

use std::path::Path;
use std::process::{Command, Stdio};

use husk::bench::{example, page, report::Report};
use serde_json::Value;

const CHROMIUM: &str = "/usr/bin/chromium";
/// Chromium windows are at least 500 pixels wide, so the page is shown in a frame.
const LOOK: &str = r#"<!doctype html><meta charset="utf-8"><title>look</title>
<iframe id="frame" width="WIDTH" height="800" srcdoc="PAGE"></iframe><pre id="seen"></pre>
<script>
const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
const over = ([r, g, b, a], below) => [r, g, b].map((part, at) => part * a + below[at] * (1 - a));
const backdrop = (view, element) => {
  if (!element) return [255, 255, 255];
  const own = rgba(view.getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, backdrop(view, element.parentElement));
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((part) => part / 255).map((part) => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const contrast = (one, other) => {
  const [darker, lighter] = [light(one), light(other)].sort((a, b) => a - b);
  return (lighter + .05) / (darker + .05);
};
onload = () => {
  const view = frame.contentWindow, page = view.document;
  let worst = { contrast: 21 };
  for (const element of page.querySelectorAll('body *')) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || ['STYLE', 'title', 'desc'].includes(element.tagName)) continue;
    const style = view.getComputedStyle(element), below = backdrop(view, element);
    const ink = over(rgba(element.namespaceURI.endsWith('svg') ? style.fill : style.color), below);
    const found = contrast(ink, below);
    if (found < worst.contrast) worst = { contrast: found, text: element.textContent.slice(0, 40), class: element.getAttribute('class') };
  }
  seen.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    loaded: view.performance.getEntriesByType('resource').map((entry) => entry.name),
    paper: view.getComputedStyle(page.documentElement).backgroundColor,
    headings: [...page.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((heading) => Number(heading.tagName[1])),
    text: page.body.innerText,
    plots: page.querySelectorAll('svg[role=img]').length,
    unnamed: [...page.querySelectorAll('svg[role=img]')].filter((svg) => !svg.querySelector('title') || !svg.querySelector('desc')).length,
    smallest: Math.min(...[...page.querySelectorAll('.plot text')].map((text) => text.getBoundingClientRect().height)),
    worst,
  });
};
</script>"#;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('"', "&quot;")
}

/// Runs Chromium without background requests and returns its output.
fn chromium(dir: &Path, arguments: &[&str]) -> Option<String> {
    if !Path::new(CHROMIUM).exists() {
        eprintln!("SKIPPED: no {CHROMIUM} (scripts/deps test installs it)");
        return None;
    }
    let output = Command::new("timeout")
        .args(["60", CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Inspects the rendered page at a given width.
fn look(report: &Report, width: u32, dark: bool) -> Option<Value> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("look.html");
    let look = LOOK.replace("WIDTH", &width.to_string()).replace("PAGE", &escaped(&page::page(report)));
    std::fs::write(&file, look).unwrap();
    let scheme = format!("--blink-settings=preferredColorScheme={}", u8::from(!dark));
    let window = format!("--window-size={},1000", width.max(500) + 50);
    let dom = chromium(dir.path(), &[&scheme, &window, "--dump-dom", &format!("file://{}", file.display())])?;
    let (_, seen) = dom.rsplit_once("<pre id=\"seen\">").expect("the page was looked at");
    let (seen, _) = seen.split_once("</pre>").unwrap();
    let seen = seen.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u{a0}").replace("&amp;", "&");
    Some(serde_json::from_str(&seen).unwrap_or_else(|error| panic!("{error}: {seen}")))
}

#[test]
fn the_page_fits_a_phone() {
    let report = example::report();
    for width in [320, 390, 768] {
        let Some(seen) = look(&report, width, false) else { return };
        assert!(seen["width"].as_u64().unwrap() <= u64::from(width), "{width}: {}", seen["width"]);
        assert!(seen["smallest"].as_f64().unwrap() >= 10.0, "letters of {} pixels at {width}", seen["smallest"]);
    }
}

#[test]
fn the_page_loads_nothing_and_runs_nothing() {
    let report = example::report();
    let page = page::page(&report);
    for way_out in ["<script", "<link", "<img", "<iframe", " src=", "url(", "@import", "href=\"http", "href=\"//"] {
        assert!(!page.contains(way_out), "{way_out}");
    }
    let Some(seen) = look(&report, 1280, false) else { return };
    assert_eq!(seen["loaded"], Value::Array(Vec::new()));
}

#[test]
fn text_is_legible_in_dark_and_light_mode() {
    let report = example::report();
    let (Some(light), Some(dark)) = (look(&report, 1280, false), look(&report, 1280, true)) else { return };
    assert_eq!(light["paper"], "rgb(255, 255, 255)");
    assert_eq!(dark["paper"], "rgb(21, 21, 21)");
    for seen in [light, dark] {
        // WCAG 2.2, 1.4.3, AA.
        assert!(seen["worst"]["contrast"].as_f64().unwrap() >= 4.5, "{}", seen["worst"]);
    }
}

#[test]
fn the_page_shows_the_report() {
    let report = example::report();
    let Some(seen) = look(&report, 1280, false) else { return };
    let text = seen["text"].as_str().unwrap();
    let names = report.contenders.iter().map(|contender| &contender.name);
    let titles = report.metrics.iter().map(|metric| &metric.title);
    for printed in report.verdict.iter().chain(names).chain(titles) {
        assert!(text.contains(printed.as_str()), "{printed}");
    }
    assert!(text.contains("apt-get install bubblewrap"));
    assert_eq!((&seen["plots"], &seen["unnamed"]), (&Value::from(report.metrics.len()), &Value::from(0)));
    let headings: Vec<u64> = seen["headings"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    assert_eq!(headings.iter().filter(|level| **level == 1).count(), 1);
    assert!(headings.windows(2).all(|pair| pair[1] <= pair[0] + 1), "{headings:?}");
}

#[test]
fn the_page_prints_completely() {
    let dir = tempfile::tempdir().unwrap();
    let (file, pdf) = (dir.path().join("page.html"), dir.path().join("page.pdf"));
    std::fs::write(&file, page::page(&example::report())).unwrap();
    let print = format!("--print-to-pdf={}", pdf.display());
    if chromium(dir.path(), &[&print, "--no-pdf-header-footer", &format!("file://{}", file.display())]).is_none() {
        return;
    }
    let pdf = std::fs::read(&pdf).unwrap();
    assert!(pdf.starts_with(b"%PDF-"));
    // The table of all numbers, collapsed on screen, takes several pages.
    let pages = pdf.windows(11).filter(|bytes| bytes == b"/Type /Page").count();
    assert!((8..40).contains(&pages), "{pages} pages");
}

#[test]
fn the_page_is_valid_html() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("page.html");
    std::fs::write(&file, page::page(&example::report())).unwrap();
    let Ok(tidy) = Command::new("tidy").args(["-q", "-e"]).arg(&file).output() else {
        eprintln!("SKIPPED: no tidy (scripts/deps test installs it)");
        return;
    };
    assert!(tidy.status.success(), "{}", String::from_utf8_lossy(&tidy.stderr));
}
