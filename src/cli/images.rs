//! `husk images`: lists images.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, HumanDuration};

use super::exit::Exit;
use super::filter::matches_glob;
use super::inspect::image;
use super::list::{Columns, Filters, ListFlags, Row};
use super::time;
use crate::foreign;
use crate::image::reference::{Reference, Version};
use crate::image::{Listed, Store};

const EXAMPLES: &str = "\
Examples:
  husk images
  husk images debian                          (all tags of it)
  husk images -q --filter dangling=true | xargs husk rmi
  husk images --format '{{.Repository}}:{{.Tag}} {{.Size}}'
  husk images --json | jq '.[].RepoTags'

Filters: dangling, label, before, since, reference";

const NONE: &str = "<none>";

const COLUMNS: Columns = Columns {
    all: &[
        ("Repository", "REPOSITORY"),
        ("Tag", "TAG"),
        ("Digest", "DIGEST"),
        ("ID", "IMAGE ID"),
        ("CreatedSince", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("Size", "SIZE"),
        ("Layers", "LAYERS"),
        ("Warm", "WARM"),
        ("Labels", "LABELS"),
        ("Label", "LABEL"),
    ],
    shown: &["Repository", "Tag", "ID", "CreatedSince", "Size", "Layers", "Warm"],
    key: "ID",
    filters: &["dangling", "label", "before", "since", "reference"],
};

/// The value of `--sort`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sort {
    Created,
    Id,
    Repository,
    Size,
    Tag,
}

/// The fields that are shown with `--digests`.
const WITH_DIGESTS: [&str; 8] = ["Repository", "Tag", "Digest", "ID", "CreatedSince", "Size", "Layers", "Warm"];

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Images {
    /// Only list images of this repository, or with this name
    #[arg(value_name = "REPOSITORY[:TAG]")]
    name: Option<String>,

    #[command(flatten)]
    list: ListFlags,

    /// Show the digests of images that are named by them
    #[arg(long)]
    digests: bool,

    /// Sort by this [default: created]
    #[arg(long, value_name = "created|id|repository|size|tag", hide_possible_values = true, hide_short_help = true)]
    sort: Option<Sort>,

    /// Print what `husk inspect` prints, as a JSON array
    #[arg(long, conflicts_with_all = ["format", "quiet"])]
    json: bool,

    /// Show all images: always on, for compatibility with `docker images`
    #[arg(short, long, hide = true)]
    all: bool,
}

impl Images {
    /// Prints the list.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        let filters = self.list.filters(&COLUMNS)?;
        let added = |key: &str| -> Result<Vec<u64>> {
            filters.values(key).map(|name| Ok(store.find(&name.parse()?)?.record.added_seconds)).collect()
        };
        let (before, since) = (added("before")?, added("since")?);
        let mut images = store.list()?;
        images.retain(|image| {
            let at = image.record.added_seconds;
            filters.any("dangling", |wanted| (wanted == "true") == image.names.is_empty())
                && filters.labels(&image.record.process.labels)
                && before.iter().all(|&other| at < other)
                && since.iter().all(|&other| at > other)
        });
        if self.name.is_some() || filters.values("reference").next().is_some() {
            images.iter_mut().for_each(|image| image.names.retain(|name| self.is_wanted(name, &filters)));
            images.retain(|image| !image.names.is_empty());
        }
        if self.sort == Some(Sort::Size) {
            images.sort_by_key(|image| image.root_bytes);
        }
        if self.json {
            let list: Vec<_> = images.into_iter().map(image::inspect).collect();
            super::print_json(&list, "the images")?;
        } else {
            let mut rows: Vec<Row> =
                images.iter().flat_map(|image| rows(image, self.list.no_trunc, self.list.is_table())).collect();
            match self.sort {
                Some(Sort::Id) => rows.sort_by_key(|row| row.text("ID")),
                Some(Sort::Repository) => rows.sort_by_key(|row| row.text("Repository")),
                Some(Sort::Tag) => rows.sort_by_key(|row| row.text("Tag")),
                Some(Sort::Created | Sort::Size) | None => {}
            }
            rows.dedup_by(|one, other| self.list.is_quiet() && one.text(COLUMNS.key) == other.text(COLUMNS.key));
            let shown = if self.digests { &WITH_DIGESTS } else { COLUMNS.shown };
            self.list.print(&Columns { shown, ..COLUMNS }, rows)?;
        }
        Ok(Exit::Success)
    }

    fn is_wanted(&self, name: &str, filters: &Filters<'_>) -> bool {
        self.name.as_ref().is_none_or(|wanted| is_named(name, wanted))
            && filters.any("reference", |pattern| is_named(name, pattern))
    }
}

/// Whether a name matches a pattern with or without a tag.
fn is_named(name: &str, pattern: &str) -> bool {
    let (repository, _) = repository_and_tag(name);
    matches_glob(name, pattern) || matches_glob(&repository, pattern)
}

/// The repository and the tag of a name.
fn repository_and_tag(name: &str) -> (String, String) {
    let Ok(reference) = name.parse::<Reference>() else { return (name.to_owned(), NONE.to_owned()) };
    let familiar = reference.familiar();
    let end = format!("{}{}", if let Version::Tag(_) = reference.version { ':' } else { '@' }, reference.version());
    let repository = familiar.strip_suffix(&end).unwrap_or(&familiar).to_owned();
    let tag = if let Version::Tag(tag) = reference.version { tag } else { NONE.to_owned() };
    (repository, tag)
}

/// A row for each name of an image. One without names is shown with what it was made from if `with_sources`.
fn rows(image: &Listed, whole_ids: bool, with_sources: bool) -> Vec<Row> {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let added = Duration::from_secs(image.record.added_seconds);
    let created = image.record.created.as_deref().and_then(|created| humantime::parse_rfc3339_weak(created).ok());
    let created = created.and_then(|created| created.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or(added);
    let row = |repository: String, tag: String, digest: String| {
        let fields = [
            ("Repository", repository),
            ("Tag", tag),
            ("Digest", digest),
            ("ID", if whole_ids { image.id.to_string() } else { image.id.short() }),
            ("CreatedSince", format!("{} ago", HumanDuration(now.saturating_sub(created)))),
            ("CreatedAt", time::date(u64::try_from(created.as_millis()).unwrap_or(0))),
            ("Size", HumanBytes(image.root_bytes).to_string()),
            ("Layers", HumanBytes(image.layer_bytes).to_string()),
            ("Warm", HumanBytes(image.warm_bytes).to_string()),
        ];
        Row::new(fields, &image.record.process.labels)
    };
    if image.names.is_empty() {
        let source = image.record.source.as_ref().filter(|_| with_sources);
        let source = source.map_or_else(|| NONE.to_owned(), |source| format!("<{source}>"));
        return vec![row(source, NONE.to_owned(), NONE.to_owned())];
    }
    let of_name = |name: &String| {
        let (repository, tag) = repository_and_tag(name);
        let digest = name.split_once('@').map_or(NONE, |(_, digest)| digest).to_owned();
        row(repository, tag, digest)
    };
    image.names.iter().map(of_name).collect()
}

/// Formats rows as aligned columns, one line each, with safe cell contents. Rows may have fewer cells than others.
pub fn table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let rows: Vec<Vec<_>> =
        rows.iter().map(|row| row.as_ref().iter().map(|cell| foreign::line(cell)).collect()).collect();
    let mut widths = Vec::new();
    for (column, cell) in rows.iter().flat_map(|row| row.iter().enumerate()) {
        widths.resize(widths.len().max(column + 1), 0);
        widths[column] = widths[column].max(cell.chars().count());
    }
    let line = |row: &Vec<Cow<str>>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_in_two_columns() {
        for (name, repository, tag) in [
            ("debian:12", "debian", "12"),
            ("localhost:5000/a/b:1", "localhost:5000/a/b", "1"),
            (&format!("a@sha256:{}", "0".repeat(64)), "a", NONE),
        ] {
            assert_eq!(repository_and_tag(name), (repository.to_owned(), tag.to_owned()), "{name}");
        }
        assert!(
            is_named("debian:12", "debian") && is_named("debian:12", "deb*:12") && is_named("debian:12", "debian:12")
        );
        assert!(!is_named("debian:12", "debian:11") && !is_named("a/debian:12", "debian"));
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "b".into()], ["long".into(), "".into()], ["é".into(), "x".into()]];
        assert_eq!(table(&rows), "a     b\nlong\né     x\n");
    }

    #[test]
    fn cells_are_sanitized() {
        let rows = [["a\nb".to_owned(), "\x1b[2J".into()], ["x".into(), "y".into()]];
        assert_eq!(table(&rows), "a\u{fffd}b  \u{fffd}[2J\nx    y\n");
    }
}
