//! `--label` and `--label-file`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::resources::text;

// Labels of a machine or a network.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct LabelFlags {
    /// Set a label, which lists can filter by; can be repeated
    #[arg(short = 'l', long = "label", value_name = "KEY[=VALUE]")]
    labels: Vec<String>,

    /// Read labels from a file, one a line
    #[arg(long = "label-file", value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl LabelFlags {
    /// The labels; those of flags override those of files. Reads the files.
    pub fn labels(&self) -> Result<BTreeMap<String, String>> {
        let mut labels = BTreeMap::new();
        for file in &self.files {
            let content = text::read(file)?;
            let lines = content.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            lines.map(str::to_owned).try_for_each(|line| add(&mut labels, &line))?;
        }
        self.labels.iter().try_for_each(|label| add(&mut labels, label))?;
        Ok(labels)
    }
}

fn add(labels: &mut BTreeMap<String, String>, label: &str) -> Result<()> {
    let (key, value) = label.split_once('=').unwrap_or((label, ""));
    if key.is_empty() {
        bail!("invalid label {label:?}: use KEY=VALUE or KEY");
    }
    labels.insert(key.to_owned(), value.to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_flags_override_those_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("labels");
        std::fs::write(&file, "# comment\na=1\n\n  b=x=y\nc\n").unwrap();
        let flags = LabelFlags { labels: vec!["a=2".into(), "d=".into()], files: vec![file] };
        let expected = [("a", "2"), ("b", "x=y"), ("c", ""), ("d", "")];
        assert_eq!(flags.labels().unwrap(), expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        assert!(LabelFlags { labels: vec!["=x".into()], files: Vec::new() }.labels().is_err());
    }
}
