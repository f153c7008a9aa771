//! What all lists have in common: `--filter`, `--format`, `--quiet` and `--no-trunc`, in Docker's words.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Map, Value};

use super::filter::Filter;
use crate::bench::plan::UsageError;
use crate::foreign;
use crate::template::Template;

// The flag of every list.
#[derive(Debug, Clone, Args)]
pub(super) struct FormatFlag {
    /// Format the output: table, json (a line for each), or a Go template such as '{{.ID}}', after `table` with a header
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    format: Option<Format>,
}

// The flags of most lists.
#[derive(Debug, Clone, Args)]
pub(super) struct ListFlags {
    /// Only list what meets a condition; the same KEY repeated: any of its values, different ones: all of them
    #[arg(short = 'f', long = "filter", value_name = "KEY=VALUE", value_parser = str::parse::<Filter>)]
    filters: Vec<Filter>,

    #[command(flatten)]
    format: FormatFlag,

    /// Do not truncate output
    #[arg(long)]
    pub no_trunc: bool,

    /// Only display IDs or names
    #[arg(short, long)]
    quiet: bool,
}

/// The value of `--format`.
#[derive(Debug, Clone, PartialEq)]
enum Format {
    /// The columns of the list.
    Table,
    /// A template's columns.
    TableOf(Template),
    /// JSON, one line for each row.
    Json,
    /// A template for each row.
    Lines(Template),
}

fn format(text: &str) -> Result<Format, String> {
    // As in Docker: a shell does not turn `\t` into a tab.
    let template = |text: &str| {
        Template::parse(&text.replace("\\t", "\t").replace("\\n", "\n")).map_err(|error| format!("{error:#}"))
    };
    Ok(match text {
        "" | "table" => Format::Table,
        "json" | "{{json .}}" => Format::Json,
        text => match text.strip_prefix("table ") {
            Some(columns) => Format::TableOf(template(columns.trim_start())?),
            None => Format::Lines(template(text)?),
        },
    })
}

/// A kind of list: what templates can name.
pub(super) struct Columns {
    /// The fields, each with its header.
    pub all: &'static [(&'static str, &'static str)],
    /// The fields that are shown by default.
    pub shown: &'static [&'static str],
    /// The field that `--quiet` shows.
    pub key: &'static str,
    /// The keys of filters.
    pub filters: &'static [&'static str],
}

/// A row: the text of each field, and labels.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    fields: Map<String, Value>,
    labels: BTreeMap<String, String>,
}

impl Row {
    /// A row of these fields, with labels, which are also the field `Labels`.
    pub fn new<const N: usize>(fields: [(&str, String); N], labels: &BTreeMap<String, String>) -> Row {
        let mut fields: Map<String, Value> =
            fields.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        let words: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        fields.insert("Labels".into(), words.join(",").into());
        Row { fields, labels: labels.clone() }
    }

    /// The text of a field.
    pub fn text(&self, field: &str) -> String {
        self.fields.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// With `.Label "KEY"`.
    fn for_templates(self) -> Value {
        let labels = self.labels.into_iter().map(|(key, value)| (key, value.into())).collect();
        let mut fields = self.fields;
        fields.insert("Label".into(), Value::Object(labels));
        Value::Object(fields)
    }
}

impl FormatFlag {
    /// The rows as text, ready to be printed to a terminal.
    pub fn text(&self, columns: &Columns, rows: Vec<Row>) -> Result<String> {
        if let Some(Format::TableOf(template) | Format::Lines(template)) = &self.format {
            let known: Vec<&str> = columns.all.iter().map(|(field, _)| *field).collect();
            template.check(&known)?;
        }
        Ok(match &self.format {
            None | Some(Format::Table) => {
                let header = columns.shown.iter().map(|field| header(columns, field)).collect();
                let cells = rows.iter().map(|row| columns.shown.iter().map(|field| row.text(field)).collect());
                let table: Vec<Vec<_>> = std::iter::once(header).chain(cells).collect();
                foreign::lines(&super::images::table(&table)).into_owned()
            }
            Some(Format::TableOf(template)) => {
                let names: Map<String, Value> =
                    columns.all.iter().map(|(field, header)| ((*field).to_owned(), (*header).into())).collect();
                let mut lines = vec![template.render(&Value::Object(names))?];
                for row in rows {
                    lines.push(template.render(&row.for_templates())?);
                }
                let cells: Vec<Vec<String>> =
                    lines.iter().map(|line| line.split('\t').map(str::to_owned).collect()).collect();
                foreign::lines(&super::images::table(&cells)).into_owned()
            }
            Some(Format::Json) => {
                let json: serde_json::Result<Vec<String>> =
                    rows.iter().map(|row| foreign::json_line(&row.fields)).collect();
                lines(json?)
            }
            Some(Format::Lines(template)) => {
                let printed: Result<Vec<String>> =
                    rows.into_iter().map(|row| template.render(&row.for_templates())).collect();
                foreign::lines(&lines(printed?)).into_owned()
            }
        })
    }
}

impl ListFlags {
    /// Whether a person reads the list, rather than a script.
    pub fn is_table(&self) -> bool {
        matches!(self.format.format, None | Some(Format::Table))
    }

    /// Whether only IDs or names are printed.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// The filters, if the list supports them.
    pub fn filters(&self, columns: &Columns) -> Result<Filters<'_>> {
        for Filter { key, .. } in &self.filters {
            let known = columns.filters;
            ensure!(
                known.contains(&key.as_str()),
                UsageError(format!("there is no filter {key:?}: use {}", known.join(", ")))
            );
        }
        Ok(Filters(&self.filters))
    }

    /// Prints the rows.
    pub fn print(&self, columns: &Columns, rows: Vec<Row>) -> Result<()> {
        if self.quiet {
            return super::print(&lines(rows.iter().map(|row| row.text(columns.key))));
        }
        super::print_raw(&self.format.text(columns, rows)?).map(drop)
    }
}

fn header(columns: &Columns, field: &str) -> String {
    columns.all.iter().find(|(name, _)| *name == field).map_or(String::new(), |(_, header)| (*header).to_owned())
}

fn lines(lines: impl IntoIterator<Item = String>) -> String {
    lines.into_iter().map(|line| line + "\n").collect()
}

/// The filters of a list.
pub(super) struct Filters<'a>(&'a [Filter]);

impl Filters<'_> {
    /// Whether there is none with this key, or `is_met` for one of those there are.
    pub fn any(&self, key: &str, is_met: impl Fn(&str) -> bool) -> bool {
        let mut values = self.values(key).peekable();
        values.peek().is_none() || values.any(is_met)
    }

    /// Whether `labels` has all that are asked for.
    pub fn labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.values("label").all(|wanted| match wanted.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|found| found == value),
            None => labels.contains_key(wanted),
        })
    }

    /// The values of a key.
    pub fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |filter| filter.key == key).map(|filter| filter.value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_dockers() {
        assert_eq!(
            (format("table"), format("json"), format("{{json .}}")),
            (Ok(Format::Table), Ok(Format::Json), Ok(Format::Json))
        );
        let row = Row::new([("ID", "1".into())], &[("a".to_owned(), "b".to_owned())].into());
        let Ok(Format::Lines(template)) = format("{{.ID}}\\t{{.Labels}} {{.Label \"a\"}}") else { panic!() };
        assert_eq!(template.render(&row.for_templates()).unwrap(), "1\ta=b b");
        assert!(matches!(format("table {{.ID}}"), Ok(Format::TableOf(_))));
        assert!(format("{{.ID").unwrap_err().contains("}}"));
        let columns = Columns { all: &[("ID", "NO"), ("Name", "NAME")], shown: &["ID"], key: "ID", filters: &[] };
        for wrong in ["{{.Nope}}", "table {{.ID}} {{.Nope}}"] {
            // Also of a list of nothing.
            let error = FormatFlag { format: Some(format(wrong).unwrap()) }.text(&columns, Vec::new()).unwrap_err();
            assert!(format!("{error:#}").ends_with("there is no field .Nope, there are ID, Name"), "{error:#}");
        }
    }

    #[test]
    fn filters_of_a_key_are_alternatives_and_labels_are_all_needed() {
        let parsed = |words: &[&str]| words.iter().map(|word| word.parse().unwrap()).collect::<Vec<Filter>>();
        let all = parsed(&["status=exited", "status=running", "label=a", "label=b=1"]);
        let filters = Filters(&all);
        assert!(filters.any("status", |status| status == "running") && filters.any("name", |_| false));
        assert!(!filters.any("status", |status| status == "paused"));
        let labels = |words: &[(&str, &str)]| {
            words.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
        };
        assert!(filters.labels(&labels(&[("a", ""), ("b", "1")])));
        assert!(!filters.labels(&labels(&[("a", ""), ("b", "2")])) && !filters.labels(&labels(&[("b", "1")])));
    }
}
