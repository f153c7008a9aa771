//! `husk network connect` and `disconnect`: change the command line with which a stopped machine is started again. The devices of
//! a running machine are those that it was started with.

use std::ffi::OsString;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use super::{Cli, Command, argv, network};
use crate::resources::bridge;
use crate::state_dir::origin::Origin;
use crate::state_dir::{MachineEntry, StateDir};

/// The spellings of the flag.
const FLAGS: [&str; 2] = ["--network", "--net"];
/// The flag for an address on the first shared network, and the one for names on all of them.
const ADDRESS: &str = "--ip";
const ALIAS: &str = "--network-alias";

/// Connects the machine `machine` to `network` from its next start on, with this address, if given, and these other names.
pub fn connect(network: &str, machine: &str, ip: Option<Ipv4Addr>, aliases: &[String]) -> Result<()> {
    let known = bridge::list()?.into_iter().find(|known| known.name == network);
    let known = known.with_context(|| format!("network {network} not found (see `husk network ls`)"))?;
    ip.map_or(Ok(()), |ip| known.check_address(ip))?;
    let options = ip.iter().map(|ip| format!(",ip={ip}")).chain(aliases.iter().map(|alias| format!(",alias={alias}")));
    let value: String = std::iter::once(format!("name={network}")).chain(options).collect();
    change(machine, |words| {
        let line = Line::parse(words)?;
        ensure!(line.networks().all(|(_, name)| name != network), "it is connected to {network} already");
        let is_first = line.networks().next().is_none();
        let mut added: Vec<OsString> = Vec::new();
        // What the machine has without any flag, it keeps.
        if is_first && line.has_user_network {
            added.extend([FLAGS[0], "user"].map(OsString::from));
        }
        added.extend([FLAGS[0].into(), value.into()]);
        Ok(line.with(added))
    })
}

/// Disconnects it.
pub fn disconnect(network: &str, machine: &str) -> Result<()> {
    change(machine, |words| Line::parse(words)?.disconnected(network))
}

fn change(machine: &str, changed: impl FnOnce(Vec<OsString>) -> Result<Vec<OsString>>) -> Result<()> {
    let state_dir = StateDir::open()?;
    let entry = state_dir.find(machine)?;
    check_stopped(&entry)?;
    let origin = Origin::read(&entry)?;
    let words = changed(origin.words()).with_context(|| format!("machine {}", entry.name()))?;
    let mut dir = state_dir.reopen(&entry.id)?;
    dir.keep();
    origin.with_words(words).write(&dir)
}

fn check_stopped(entry: &MachineEntry) -> Result<()> {
    let name = entry.name();
    ensure!(
        !entry.alive,
        "machine {name} is running, and keeps the network devices that it was started with: \
         run `husk stop {name}` before, and `husk start {name}` afterwards"
    );
    ensure!(
        entry.suspended().is_none(),
        "machine {name} is suspended, and keeps its network devices: remove it instead"
    );
    super::lifecycle::check_restartable(entry)
}

/// A command line that starts a machine.
struct Line {
    words: Vec<OsString>,
    /// Where its options begin, and end.
    options: std::ops::Range<usize>,
    /// Whether it has user-mode networking without any flag.
    has_user_network: bool,
}

impl Line {
    fn parse(words: Vec<OsString>) -> Result<Line> {
        let program = std::iter::once(OsString::from("husk"));
        let cli = Cli::try_parse_from(program.chain(words.iter().cloned())).context("understand how it was started")?;
        let (trailing, has_user_network) = match &cli.command {
            Command::Run(run) => (run.trailing_words(), true),
            Command::Create(create) => (create.trailing_words(), true),
            _ => (0, false),
        };
        let options = argv::command_index(&words)? + 1..words.len().saturating_sub(trailing);
        Ok(Line { words, options, has_user_network })
    }

    /// The words that the name of a network is in or follows, and that name.
    fn networks(&self) -> impl Iterator<Item = (usize, String)> {
        self.flags(&FLAGS).map(|(place, value)| {
            let first = value.split(',').next().unwrap_or_default();
            (place, first.strip_prefix("name=").unwrap_or(first).to_owned())
        })
    }

    /// Those of networks of `husk network create`.
    fn shared(&self) -> impl Iterator<Item = (usize, String)> {
        self.networks().filter(|(_, name)| network::is_shared(name))
    }

    /// Without the shared network `network`, and what is for it.
    fn disconnected(mut self, network: &str) -> Result<Vec<OsString>> {
        let found = self.shared().position(|(_, name)| name == network);
        let index = found.with_context(|| format!("it is not connected to {network}"))?;
        let is_only = self.networks().count() == 1;
        let unused: &[&str] = match (index, self.shared().count()) {
            (0, 1) => &[ADDRESS, ALIAS],
            (0, _) => &[ADDRESS],
            _ => &[],
        };
        let (place, _) = self.shared().nth(index).context("a network that has been found")?;
        self = self.without(place);
        let places: Vec<usize> = self.flags(unused).map(|(place, _)| place).collect();
        for place in places.into_iter().rev() {
            self = self.without(place);
        }
        Ok(self.with(if is_only { vec![FLAGS[0].into(), "none".into()] } else { Vec::new() }))
    }

    /// The words that one of the flags `names` is in, and its values.
    fn flags(&self, names: &[&str]) -> impl Iterator<Item = (usize, &str)> {
        let options = self.words.get(self.options.clone()).unwrap_or_default();
        let value = move |at: usize| -> Option<(usize, &str)> {
            let word = options.get(at)?.to_str()?;
            let value = if names.contains(&word) {
                options.get(at + 1)?.to_str()?
            } else {
                names.iter().find_map(|flag| word.strip_prefix(flag)?.strip_prefix('='))?
            };
            Some((self.options.start + at, value))
        };
        (0..options.len()).filter_map(value)
    }

    /// The number of words of the option at this place.
    fn len_at(&self, place: usize) -> usize {
        let is_flag = |word: &str| FLAGS.contains(&word) || [ADDRESS, ALIAS].contains(&word);
        1 + usize::from(self.words.get(place).and_then(|word| word.to_str()).is_some_and(is_flag))
    }

    /// Adds networks behind the others: some options are for the first one.
    fn with(self, added: Vec<OsString>) -> Vec<OsString> {
        let last = self.networks().last().map(|(place, _)| place + self.len_at(place));
        let place = last.unwrap_or(self.options.start);
        let mut words = self.words;
        words.splice(place..place, added);
        words
    }

    /// Removes the option at this place, with its value.
    fn without(mut self, place: usize) -> Line {
        let count = self.len_at(place);
        self.words.drain(place..place + count);
        self.options.end -= count;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line::parse(text.split(' ').map(OsString::from).collect()).unwrap()
    }

    fn text(words: &[OsString]) -> String {
        words.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn only_options_of_husk_are_networks() {
        let line = line("run -d --network user --net=name=web,alias=a x sh --network db");
        let names: Vec<String> = line.networks().map(|(_, name)| name).collect();
        assert_eq!((names, line.has_user_network), (vec!["user".to_owned(), "web".to_owned()], true));
        let line = super::Line::parse(["run", "--ip=10.0.0.2", "x", "--ip", "y"].map(OsString::from).to_vec()).unwrap();
        let addresses: Vec<_> = line.flags(&[ADDRESS]).collect();
        assert_eq!((addresses.as_slice(), line.len_at(1)), (&[(1, "10.0.0.2")][..], 1));
    }

    #[test]
    fn the_address_and_names_on_a_network_are_removed_with_it() {
        for (words, network, expected) in [
            ("--network user --ip 10.0.0.2 --network a x", "a", "--network user x"),
            ("--network a --ip=10.0.0.2 --network-alias w x", "a", "--network none x"),
            ("--network a --ip=10.0.0.2 --network b --network-alias w x", "a", "--network b --network-alias w x"),
            ("--network a --ip=10.0.0.2 --network b x", "b", "--network a --ip=10.0.0.2 x"),
            ("--network-alias=v --network tap=t --network a --network-alias w x", "a", "--network tap=t x"),
        ] {
            let disconnected = line(&format!("run {words}")).disconnected(network).unwrap();
            assert_eq!(text(&disconnected), format!("run {expected}"), "{words}");
        }
        let absent = line("run --network user --network a x").disconnected("user").unwrap_err();
        assert_eq!(absent.to_string(), "it is not connected to user");
    }

    #[test]
    fn a_network_is_added_and_removed() {
        let added = line("--verbose run -d x sh").with(vec!["--network".into(), "web".into()]);
        assert_eq!(text(&added), "--verbose run --network web -d x sh");
        let second = line("run --network n1 -d --ip 10.0.0.2 x sh").with(vec!["--network".into(), "n2".into()]);
        assert_eq!(text(&second), "run --network n1 --network n2 -d --ip 10.0.0.2 x sh");
        for words in ["run -d --network web x --network", "run -d --network=web,alias=a x --network"] {
            let line = line(words);
            let place = line.networks().next().unwrap().0;
            assert_eq!(text(&line.without(place).with(Vec::new())), "run -d x --network");
        }
    }
}
