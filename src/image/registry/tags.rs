//! Lists the tags of a repository (OCI distribution specification, "Listing Tags").

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Registry, SMALL_TIMEOUT};
use crate::image::config::JSON_MAX_BYTES;

/// More tags than anybody wants to pull.
pub const TAGS_MAX: usize = 10_000;

#[derive(Deserialize)]
struct List {
    /// Go writes `null` for none.
    tags: Option<Vec<String>>,
}

impl Registry {
    /// All tags, page by page.
    pub fn tags(&self) -> Result<Vec<String>> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let last = all.last().map(|last| format!("&last={last}")).unwrap_or_default();
            let path = format!("tags/list?n=1000{last}");
            let mut response = self.get(&path, "application/json", 0, Some(SMALL_TIMEOUT))?;
            let has_more = response.headers().contains_key("link");
            let json = response.body_mut().with_config().limit(JSON_MAX_BYTES).read_to_vec()?;
            let tags = serde_json::from_slice::<List>(&json).context("read the list of tags")?.tags.unwrap_or_default();
            let is_over = !has_more || tags.is_empty();
            all.extend(tags);
            ensure!(all.len() <= TAGS_MAX, "it has more than {TAGS_MAX} tags");
            if is_over {
                return Ok(all);
            }
        }
    }
}
