//! `husk events`: prints what happens to machines, images and networks.

use std::fmt::Display;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::exit::Exit;
use super::{reach, time};
use crate::foreign;
use crate::state_dir::StateDir;
use crate::state_dir::events::Event;
use crate::template::Template;

const EXAMPLES: &str = "\
Examples:
  husk events                       (from now on, until Ctrl-C)
  husk events --since 10m --until 0s --filter event=die
  husk events --filter container=web --format json";

/// The interval at which new events are looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The fields of an event.
const FIELDS: [&str; 9] = ["Type", "Action", "Actor", "timeNano", "status", "id", "scope", "time", "from"];

/// Notes that `action` has happened to the image, network or volume with this ID.
pub fn note(kind: &str, action: &str, id: impl Display, name: impl Display) {
    // It has happened, noted or not.
    if let Ok(state_dir) = StateDir::open() {
        state_dir.note(&[Event::new(kind, action, &id.to_string()).with("name", name.to_string())]);
    }
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Events {
    /// Show events since a timestamp (2026-01-31T12:00:00Z) or relative time (10m)
    #[arg(long, value_name = "TIME", value_parser = time::timestamp_ns)]
    since: Option<u64>,

    /// Show events until a timestamp or relative time, and exit
    #[arg(long, value_name = "TIME", value_parser = time::timestamp_ns)]
    until: Option<u64>,

    /// Show only some events, by container, event, image, label, network or type; of the same kind, one of several suffices
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = filter)]
    filter: Vec<(Key, String)>,

    /// Format each event: json, or a Go template such as '{{.Action}} {{.Actor.ID}}'
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Container,
    Event,
    Image,
    Label,
    Network,
    Type,
}

impl Events {
    /// Prints events until the time is over or the reader is gone.
    pub fn run(self) -> Result<Exit> {
        let format = Format::parse(self.format.as_deref())?;
        let mut events = StateDir::open()?.events();
        let since = self.since.or(self.until.map(|_| 0)).unwrap_or_else(now_ns);
        loop {
            // Before the file is read to its end, so that nothing that was noted in time is missed.
            let is_over = self.until.is_some_and(|until| now_ns() >= until);
            for event in events.by_ref() {
                let is_in_time = event.time_ns >= since && self.until.is_none_or(|until| event.time_ns <= until);
                if is_in_time && self.is_wanted(&event) && !super::print_raw(&format.line(&event)?)? {
                    return Ok(Exit::Success);
                }
            }
            if is_over {
                return Ok(Exit::Success);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn is_wanted(&self, event: &Event) -> bool {
        let is_of_helper = event.actor.attributes.contains_key(reach::FILES_OF);
        let keys = [Key::Container, Key::Event, Key::Image, Key::Label, Key::Network, Key::Type];
        !is_of_helper
            && keys.into_iter().all(|key| {
                let mut values =
                    self.filter.iter().filter(|(other, _)| *other == key).map(|(_, value)| value).peekable();
                values.peek().is_none() || values.any(|value| matches(event, key, value))
            })
    }
}

/// How an event is printed.
enum Format {
    Text,
    Json,
    Template(Template),
}

impl Format {
    fn parse(text: Option<&str>) -> Result<Format> {
        Ok(match text {
            None => Format::Text,
            Some("json") => Format::Json,
            Some(template) => {
                let template = Template::parse(template)?;
                template.check(&FIELDS)?;
                Format::Template(template)
            }
        })
    }

    fn line(&self, event: &Event) -> Result<String> {
        let text = match self {
            Format::Text => as_text(event),
            Format::Json => serde_json::to_string(&as_json(event))?,
            Format::Template(template) => {
                let mut value = as_json(event);
                if value["from"].is_null() {
                    value["from"] = json!("");
                }
                template.render(&value)?
            }
        };
        Ok(foreign::line(&text).into_owned() + "\n")
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn matches(event: &Event, key: Key, value: &str) -> bool {
    let attribute = |name: &str| event.actor.attributes.get(name).is_some_and(|found| found == value);
    let is_it = |kind: &str| event.kind == kind && (event.actor.id.starts_with(value) || attribute("name"));
    match key {
        Key::Container => !value.is_empty() && is_it("container"),
        // `exec_start: sh -c …`
        Key::Event => event.action.split(':').next() == Some(value),
        Key::Image => !value.is_empty() && (is_it("image") || attribute("image")),
        Key::Label => match value.split_once('=') {
            Some((label, value)) => event.actor.attributes.get(label).is_some_and(|found| found == value),
            None => event.actor.attributes.contains_key(value),
        },
        Key::Network => !value.is_empty() && is_it("network"),
        Key::Type => event.kind == value,
    }
}

fn as_text(event: &Event) -> String {
    let attributes: Vec<String> =
        event.actor.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let (when, id) = (time::rfc3339(event.time_ns), &event.actor.id);
    format!("{when} {} {} {id} ({})", event.kind, event.action, attributes.join(", "))
}

fn as_json(event: &Event) -> Value {
    let mut value = json!(event);
    value["status"] = json!(event.action);
    value["id"] = json!(event.actor.id);
    value["scope"] = json!("local");
    value["time"] = json!(event.time_ns / 1_000_000_000);
    if let Some(image) = event.actor.attributes.get("image") {
        value["from"] = json!(image);
    }
    value
}

fn filter(text: &str) -> Result<(Key, String), String> {
    let wrong = || format!("{text:?} is not a filter: use container=, event=, image=, label=, network= or type=");
    let (key, value) = text.split_once('=').ok_or_else(wrong)?;
    let key = match key {
        "container" => Key::Container,
        "event" => Key::Event,
        "image" => Key::Image,
        "label" => Key::Label,
        "network" => Key::Network,
        "type" => Key::Type,
        _ => return Err(wrong()),
    };
    Ok((key, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn died() -> Event {
        let event = Event::new("container", "die", "0123456789ab");
        Event { time_ns: 1_500_000_000, ..event.with("image", "debian:12").with("name", "web").with("exitCode", 3) }
    }

    fn are_wanted(filters: &[&str]) -> bool {
        let filter = filters.iter().map(|text| filter(text).unwrap()).collect();
        Events { since: None, until: None, filter, format: None }.is_wanted(&died())
    }

    #[test]
    fn filters_of_one_kind_are_alternatives() {
        for wanted in [
            &[][..],
            &["event=die"],
            &["event=start", "event=die"],
            &["container=web", "type=container"],
            &["container=0123"],
            &["image=debian:12"],
            &["image=debian:12"],
            &["label=name", "label=exitCode=3"],
        ] {
            assert!(are_wanted(wanted), "{wanted:?}");
        }
        for unwanted in [
            &["event=start"][..],
            &["event=die", "container=db"],
            &["type=image"],
            &["network=web"],
            &["container="],
            &["label=name=db"],
        ] {
            assert!(!are_wanted(unwanted), "{unwanted:?}");
        }
        assert!(filter("die").is_err() && filter("color=red").is_err());
    }

    #[test]
    fn machines_that_serve_the_files_of_others_are_not_shown() {
        let all = Events { since: None, until: None, filter: Vec::new(), format: None };
        assert!(all.is_wanted(&died()) && !all.is_wanted(&died().with(reach::FILES_OF, "0123456789ab")));
    }

    #[test]
    fn an_event_is_a_line_like_dockers() {
        let text = "1970-01-01T00:00:01.500000000Z container die 0123456789ab (exitCode=3, image=debian:12, name=web)";
        assert_eq!(as_text(&died()), text);
        let value = as_json(&died());
        assert_eq!((&value["status"], &value["from"], &value["time"]), (&json!("die"), &json!("debian:12"), &json!(1)));
        assert_eq!(value["Actor"]["Attributes"]["exitCode"], "3");
        let template = Format::parse(Some("{{.Action}} {{.Actor.Attributes.name}}")).unwrap();
        assert_eq!(template.line(&died()).unwrap(), "die web\n");
        let Err(error) = Format::parse(Some("{{.Nope}}")) else { panic!() };
        assert!(
            format!("{error:#}")
                .ends_with("no field .Nope, there are Type, Action, Actor, timeNano, status, id, scope, time, from")
        );
        let created = Format::parse(Some("{{.Action}} <{{.From}}>")).unwrap();
        assert_eq!(created.line(&Event::new("network", "create", "web")).unwrap(), "create <>\n");
    }
}
