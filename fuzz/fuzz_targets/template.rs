//! Parses templates of `--format` and uses them. Templates are the user's, and values anybody's: whatever both are, the result is text
//! or an error.
//!
//! Covers: template/
#![no_main]

use std::fs;
use std::path::Path;

use husk::template::Template;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |text: &str| {
    let (template, json) = text.split_once('\0').unwrap_or((text, VALUE));
    let Ok(template) = Template::parse(template) else { return };
    if let Ok(value) = serde_json::from_str(json) {
        let _ = template.render(&value);
    }
});

const VALUE: &str =
    r#"{"Name":"web","Size":7,"State":{"Running":true,"Health":null},"Cmd":["a","b"],"Labels":{"x":"y"}}"#;

/// Writes the initial corpus: one template for each construct.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/template"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let templates = [
        r#"{{range $k, $v := .Labels}}{{$k}}={{json $v}}{{println}}{{else}}none{{end}}"#,
        r#"{{if and .State.Running (eq .Name "web")}}{{.State.Health}}{{else if .Size}}{{- len .Cmd -}}{{end}}"#,
        r#"{{with .Cmd}}{{join . ","}}{{index . 1 | upper | printf "%-5.2s%q" `x`}}{{end}}{{/* c */}}"#,
        r#"{{$x := slice .Name 0 1}}{{$x = truncate $x 9}}{{pad $x 1 2}}{{title (split "a b" " " | print)}}"#,
    ];
    for (number, template) in templates.iter().enumerate() {
        fs::write(corpus.join(number.to_string()), template).expect("the corpus can be written");
    }
}
