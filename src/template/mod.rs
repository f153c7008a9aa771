//! Templates for `--format`: the part of Go's text/template, with Docker's functions, that is used on command lines.
//!
//! ```text
//! text ─ scan (text, tags) ─ parse ─> Template ─ evaluate, with a JSON value ─> text
//! ```
//!
//! Unlike in Go, every value is JSON: there are no methods, and a field with an argument (`{{.Label "x"}}`) is looked up like `index`.
//! Templates come from the user, values from anywhere.

mod evaluate;
mod fields;
mod functions;
mod parse;
mod scan;

use anyhow::{Context, Result};
use serde_json::Value;

pub use self::functions::shown;

/// A template, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    nodes: Vec<parse::Node>,
}

impl Template {
    /// Parses a template. Errors are syntax errors, and unknown functions.
    pub fn parse(text: &str) -> Result<Template> {
        let nodes = parse::parse(text).context("parse the template")?;
        Ok(Template { nodes })
    }

    /// Fails if the template names a field of the value other than `known`, without a value to fill in.
    pub fn check(&self, known: &[&str]) -> Result<()> {
        fields::check(&self.nodes, known).context("use the template")
    }

    /// Fills in `value`. A field that does not exist is an error.
    pub fn render(&self, value: &Value) -> Result<String> {
        evaluate::render(&self.nodes, value).context("use the template")
    }
}

#[cfg(test)]
mod tests;
