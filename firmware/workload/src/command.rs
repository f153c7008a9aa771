//! Parses the command line.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::task;

pub const HELP: &str = "\
The work program of husk bench.

do NAME=AMOUNT...     does so much of each, in turn: operations, or bytes where a rate of bytes is measured
   --cpus N           threads of the measures that end in -all (default: as many as there are processors)
   --root-data FILE   what root-read reads (default: /.husk-bench/data)
   --root DIR         where root-write writes (default: /, or /tmp where / is read-only)
   --scratch DIR      where the scratch measures are done (default: /scratch)
hello [--exit CODE]   says `work: ready` and ends
idle [--touch MIB]    says so and sleeps until SIGTERM, having used and given back so much memory
tick MS               says `work: tick` so often, until SIGTERM
serve PORT            answers connections, until SIGTERM
crash memory [--at-most MIB]
                      uses memory until it is killed
crash kernel --this-is-a-machine
                      has the kernel crash: the host's, where it is not in a machine
guest [--scratch] [--net ADDRESS/PREFIX,GATEWAY] [--end power-off|reset] COMMAND...
                      as PID 1 of a machine: does one of the above, says `work: exit CODE` and ends the machine;
                      a byte of COMMAND may be written as %20
nothing               ends at once
";

/// The locations of files used by tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub cpus: usize,
    pub root_data: PathBuf,
    pub root: Option<PathBuf>,
    pub scratch: PathBuf,
}

impl Default for Place {
    fn default() -> Place {
        Place {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            root_data: "/.husk-bench/data".into(),
            root: None,
            scratch: "/scratch".into(),
        }
    }
}

/// How a machine ends, which VMMs detect in different ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    PowerOff,
    Reset,
}

/// The machine's address and its gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Net {
    pub ip: IpAddr,
    pub prefix: u8,
    pub gateway: IpAddr,
}

/// The tasks of PID 1 in a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    pub scratch: bool,
    pub net: Option<Net>,
    pub end: End,
    pub command: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Help,
    Nothing,
    Do { tasks: Vec<(String, u64)>, place: Place },
    Hello { code: u8 },
    Idle { touch_mib: usize },
    Tick { interval_ms: u16 },
    Serve { port: u16 },
    CrashMemory { at_most_mib: usize },
    CrashKernel,
    Guest(Guest),
}

impl Command {
    pub fn parse(words: &[String]) -> Result<Command, String> {
        let mut words = Words(words.iter());
        let command = match words.next("a command")? {
            "--help" | "-h" => Command::Help,
            "nothing" => Command::Nothing,
            "do" => parse_do(&mut words)?,
            "hello" => Command::Hello { code: words.option("--exit")?.unwrap_or(0) },
            "idle" => Command::Idle { touch_mib: words.option("--touch")?.unwrap_or(0) },
            "tick" => Command::Tick { interval_ms: words.value("milliseconds")? },
            "serve" => Command::Serve { port: words.value("a port")? },
            "crash" => parse_crash(&mut words)?,
            "guest" => Command::Guest(parse_guest(&mut words)?),
            other => return Err(format!("unknown command {other:?}: type --help for a list")),
        };
        match words.0.next() {
            Some(word) => Err(format!("unexpected argument {word:?}: type --help for the syntax")),
            None => Ok(command),
        }
    }
}

fn parse_do(words: &mut Words) -> Result<Command, String> {
    let (mut tasks, mut place) = (Vec::new(), Place::default());
    while let Some(word) = words.0.next() {
        match word.as_str() {
            "--cpus" => place.cpus = words.value("a number of threads")?,
            "--root-data" => place.root_data = words.next("a file")?.into(),
            "--root" => place.root = Some(words.next("a directory")?.into()),
            "--scratch" => place.scratch = words.next("a directory")?.into(),
            word => tasks.push(parse_task(word)?),
        }
    }
    if tasks.is_empty() || place.cpus == 0 {
        return Err("no task: type do NAME=AMOUNT".into());
    }
    Ok(Command::Do { tasks, place })
}

fn parse_task(word: &str) -> Result<(String, u64), String> {
    let wrong = || format!("invalid task {word:?}: type NAME=AMOUNT, AMOUNT at least 1, NAME one of {}", task::names());
    let (name, amount) = word.split_once('=').ok_or_else(wrong)?;
    let amount = amount.parse().ok().filter(|amount| *amount > 0).ok_or_else(wrong)?;
    if task::is_known(name) { Ok((name.to_owned(), amount)) } else { Err(wrong()) }
}

fn parse_crash(words: &mut Words) -> Result<Command, String> {
    match words.next("memory or kernel")? {
        "memory" => Ok(Command::CrashMemory { at_most_mib: words.option("--at-most")?.unwrap_or(usize::MAX) }),
        "kernel" if words.flag("--this-is-a-machine") => Ok(Command::CrashKernel),
        "kernel" => Err("this would crash the host's kernel: type --this-is-a-machine if this is a machine".into()),
        other => Err(format!("unknown crash {other:?}: type memory or kernel")),
    }
}

fn parse_guest(words: &mut Words) -> Result<Guest, String> {
    let mut guest = Guest { scratch: false, net: None, end: End::PowerOff, command: Vec::new() };
    loop {
        match words.next("a command for the machine")? {
            "--scratch" => guest.scratch = true,
            "--net" => guest.net = Some(parse_net(words.next("ADDRESS/PREFIX,GATEWAY")?)?),
            "--end" => {
                guest.end = match words.next("power-off or reset")? {
                    "power-off" => End::PowerOff,
                    "reset" => End::Reset,
                    other => return Err(format!("unknown end {other:?}: type power-off or reset")),
                }
            }
            "--" => {}
            first => {
                let all = std::iter::once(first).chain(words.0.by_ref().map(String::as_str));
                guest.command = all.map(decode).collect();
                return Ok(guest);
            }
        }
    }
}

fn parse_net(word: &str) -> Result<Net, String> {
    let parse = || {
        let (address, gateway) = word.split_once(',')?;
        let (ip, prefix) = address.split_once('/')?;
        Some(Net { ip: ip.parse().ok()?, prefix: prefix.parse().ok()?, gateway: gateway.parse().ok()? })
    };
    parse().ok_or_else(|| format!("invalid network {word:?}: type ADDRESS/PREFIX,GATEWAY"))
}

/// Decodes a word: a kernel's command line cannot contain spaces and quotes in words, so they are written as `%20`, and
/// an empty word as `%00` (husk's bench::workload::escape).
fn decode(word: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let escaped = behind.get(..2).filter(|_| first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    // Words never contain a zero byte: it represents an empty word.
    bytes.retain(|byte| *byte != 0);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The remaining words.
struct Words<'a>(std::slice::Iter<'a, String>);

impl<'a> Words<'a> {
    fn next(&mut self, what: impl Display) -> Result<&'a str, String> {
        self.0.next().map(String::as_str).ok_or_else(|| format!("{what} is missing: type --help for the syntax"))
    }

    fn value<T: FromStr>(&mut self, what: impl Display) -> Result<T, String> {
        let word = self.next(&what)?;
        word.parse().map_err(|_| format!("{word:?} is not {what}: type --help for the syntax"))
    }

    fn flag(&mut self, name: &str) -> bool {
        let found = self.0.as_slice().first().is_some_and(|word| word == name);
        if found {
            self.0.next();
        }
        found
    }

    fn option<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        if self.flag(name) { self.value(format_args!("a number for {name}")).map(Some) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        Command::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn work_has_a_name_and_an_amount() {
        let Ok(Command::Do { tasks, place }) = parse("do syscall=10 --cpus 3 fork=2 --scratch /mnt") else {
            panic!("not understood")
        };
        assert_eq!(tasks, [("syscall".to_owned(), 10), ("fork".to_owned(), 2)]);
        assert_eq!((place.cpus, place.scratch), (3, "/mnt".into()));
        for wrong in
            ["do", "do syscall", "do syscall=", "do syscall=0", "do syscall=-1", "do sleep=1", "do --cpus 0 fork=1"]
        {
            let why = parse(wrong).unwrap_err();
            assert!(why.contains("NAME=AMOUNT"), "{wrong}: {why}");
        }
    }

    #[test]
    fn errors_say_what_to_type() {
        for (line, expected) in [
            ("", "a command is missing"),
            ("dance", "--help"),
            ("hello --exit 256", "a number for --exit"),
            ("hello --exit", "is missing"),
            ("hello there", "unexpected argument"),
            ("tick soon", "milliseconds"),
            ("crash kernel", "--this-is-a-machine"),
            ("guest --net 10.0.0.2 hello", "ADDRESS/PREFIX,GATEWAY"),
            ("guest --end explosion hello", "power-off or reset"),
            ("guest --scratch", "a command for the machine"),
        ] {
            let why = parse(line).unwrap_err();
            assert!(why.contains(expected), "{line}: {why}");
        }
    }

    #[test]
    fn guest_arguments_are_parsed() {
        let net = "10.0.2.15/24,10.0.2.2";
        let expected = Guest {
            scratch: true,
            net: Some(parse_net(net).unwrap()),
            end: End::Reset,
            command: ["sh", "-c", "echo 'a b' 100%", ""].map(str::to_owned).into(),
        };
        // Also without `--`, where a kernel's command line ends.
        for dashes in ["", "-- "] {
            let line = format!("guest --scratch --net {net} --end reset {dashes}sh -c echo%20%27a%20b%27%20100% %00");
            assert_eq!(parse(&line), Ok(Command::Guest(expected.clone())));
        }
    }
}
