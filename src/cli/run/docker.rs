//! Flags of `docker run` and `podman run` that a machine satisfies without doing anything, and those that it cannot have.
//! docs/docker.md lists all of them.

use anyhow::{Result, ensure};
use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::cli::cpus::Cpus;
use crate::cli::time;
use crate::guest::session::Attached;

// CPU time as a quota, and the grace period of `husk stop`.
#[derive(Debug, Default, Args)]
pub(in crate::cli) struct DockerFlags {
    /// Limit host CPU time to this many microseconds per --cpu-period; --cpus says the same in CPUs
    #[arg(long, value_name = "US", hide_short_help = true, conflicts_with_all = ["cpus", "from"])]
    #[arg(value_parser = clap::value_parser!(u64).range(1000..))]
    cpu_quota: Option<u64>,

    /// The period of --cpu-quota in microseconds
    #[arg(long, value_name = "US", hide_short_help = true, requires = "cpu_quota", default_value = "100000")]
    #[arg(value_parser = clap::value_parser!(u64).range(1000..=1_000_000))]
    cpu_period: u64,

    /// Time that `husk stop` waits before killing the machine, in seconds or with a unit [default: 10]
    #[arg(long, value_name = "TIME", value_parser = time::duration)]
    pub stop_timeout: Option<std::time::Duration>,

    /// Attach only this stream; can be repeated. With stdin alone, the machine's ID is printed, and it is left in the background
    #[arg(short, long, value_name = "STREAM", value_parser = stream, hide_short_help = true)]
    attach: Vec<String>,

    /// Forward signals to the command; with false, they end this process and leave the machine running
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, default_value = "true", hide_default_value = true, hide_short_help = true)]
    pub sig_proxy: bool,

    #[command(flatten)]
    _satisfied: Satisfied,
}

impl DockerFlags {
    /// Whether no output of the machine is attached.
    pub fn attaches_only_input(&self) -> bool {
        !self.attach.is_empty() && self.attach.iter().all(|stream| stream == "stdin")
    }

    /// The streams that are attached.
    pub fn attached(&self) -> Attached {
        let has = |name: &str| self.attach.is_empty() || self.attach.iter().any(|stream| stream == name);
        Attached { stdin: has("stdin"), stdout: has("stdout"), stderr: has("stderr"), outlived: false }
    }

    /// The CPUs that `--cpu-quota` asks for.
    pub fn cpus(&self) -> Result<Option<Cpus>> {
        let Some(quota) = self.cpu_quota else { return Ok(None) };
        let millicpus = u32::try_from(quota.saturating_mul(1000) / self.cpu_period.max(1)).unwrap_or(u32::MAX);
        ensure!(millicpus >= 10, "--cpu-quota: the minimum is a hundredth of --cpu-period");
        let limit_millicpus = (millicpus % 1000 != 0).then_some(millicpus);
        Ok(Some(Cpus { vcpus: millicpus.div_ceil(1000), limit_millicpus }))
    }
}

/// The name of a stream, in small letters.
fn stream(text: &str) -> Result<String, String> {
    let name = text.to_ascii_lowercase();
    let is_known = matches!(name.as_str(), "stdin" | "stdout" | "stderr");
    is_known.then_some(name).ok_or_else(|| "use stdin, stdout or stderr".to_owned())
}

/// A flag that a machine satisfies anyway.
struct Idle {
    long: &'static str,
    values: Values,
}

/// The values that are satisfied.
enum Values {
    /// Any.
    Any,
    /// None, `=true` or `=false`.
    Switch,
    /// One of them, whatever follows a `=`; others are refused for this reason.
    OneOf(&'static [&'static str], &'static str),
    /// None, or this one; the other is refused for this reason.
    Only(&'static [&'static str], &'static str),
}

const fn idle(long: &'static str, values: Values) -> Idle {
    Idle { long, values }
}

const OWN_KERNEL: &str =
    "a machine has a kernel of its own, and shares no namespace with the host or with other machines";

const IDLE: [Idle; 18] = [
    idle("annotation", Values::Any),
    idle("cgroupns", Values::OneOf(&["", "private", "host"], OWN_KERNEL)),
    idle("detach-keys", Values::Any),
    idle("disable-content-trust", Values::Switch),
    idle("init", Values::Switch),
    idle("ipc", Values::OneOf(&["", "none", "private", "shareable"], OWN_KERNEL)),
    idle("isolation", Values::OneOf(&["", "default"], "machines have one kind of isolation")),
    idle("kernel-memory", Values::Any),
    idle(
        "log-driver",
        Values::OneOf(
            &["", "json-file", "local", "k8s-file", "none"],
            "husk keeps the logs itself, and `husk logs` prints them",
        ),
    ),
    idle("memory-reservation", Values::Any),
    idle("memory-swap", Values::Any),
    idle("memory-swappiness", Values::Any),
    idle(
        "oom-kill-disable",
        Values::Only(&["false"], "a guest's kernel ends programs when its memory is used up: use -m"),
    ),
    idle("pid", Values::OneOf(&["", "private"], OWN_KERNEL)),
    idle("privileged", Values::Switch),
    idle("userns", Values::OneOf(&["", "host", "private"], OWN_KERNEL)),
    idle("uts", Values::OneOf(&["", "private"], OWN_KERNEL)),
    idle("volume-driver", Values::OneOf(&["", "local"], "volumes are folders of this host")),
];

/// The flags of [`IDLE`], which are parsed and forgotten.
#[derive(Debug, Default)]
struct Satisfied;

impl Args for Satisfied {
    fn augment_args(command: Command) -> Command {
        command.args(IDLE.iter().map(Idle::arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Satisfied::augment_args(command)
    }
}

impl FromArgMatches for Satisfied {
    fn from_arg_matches(_matches: &ArgMatches) -> Result<Satisfied, clap::Error> {
        Ok(Satisfied)
    }

    fn update_from_arg_matches(&mut self, _matches: &ArgMatches) -> Result<(), clap::Error> {
        Ok(())
    }
}

impl Idle {
    fn arg(&self) -> Arg {
        let arg = Arg::new(self.long).long(self.long).hide(true).action(ArgAction::Append);
        let is_switch = matches!(self.values, Values::Switch | Values::Only(..));
        let arg = if is_switch { arg.num_args(0..=1).require_equals(true) } else { arg.allow_hyphen_values(true) };
        match self.values {
            Values::Any => arg,
            Values::Switch => arg.default_missing_value("true").value_parser(switch),
            Values::OneOf(values, why) => arg.value_parser(one_of(values, why)),
            Values::Only(values, why) => arg.default_missing_value("true").value_parser(one_of(values, why)),
        }
    }
}

/// A boolean, as Go's strconv.ParseBool takes it.
fn switch(text: &str) -> Result<String, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False" => {
            Ok(text.to_owned())
        }
        path if path.starts_with('/') => Err(format!("use --os-init {path} to run an init of the image")),
        _ => Err("use true or false".to_owned()),
    }
}

fn one_of(values: &'static [&'static str], why: &'static str) -> ValueParser {
    let parse = move |text: &str| {
        let word = text.split('=').next().unwrap_or_default();
        if values.iter().any(|value| word.eq_ignore_ascii_case(value)) {
            Ok(text.to_owned())
        } else {
            Err(why.to_owned())
        }
    };
    ValueParser::new(parse)
}

const ONLY_WINDOWS: &str = "it is for containers of Windows";
const OWN_DEVICES: &str =
    "a machine has devices of its own, and none of the host's: share files with -v, or use `husk boot --disk`";
const DISK_LIMITS: &str = "use --disk-bps and --disk-iops, which limit the machine's disks";
const USER_IDS: &str = "a machine has all user IDs, and -v maps those of the host";
const CREDENTIALS: &str = "use `husk login`, or the credentials of docker and podman";

/// Flags that a machine cannot have, without dashes, and why, or what to type instead.
const REFUSED: [(&str, &str); 72] = [
    ("arch", "machines are linux/amd64"),
    ("authfile", CREDENTIALS),
    ("blkio-weight", DISK_LIMITS),
    ("blkio-weight-device", DISK_LIMITS),
    ("cgroup-conf", "use --cpus, --cpu-shares and --host-memory"),
    ("cgroup-parent", "start husk in the cgroup, for example with `systemd-run --scope --slice=NAME husk run …`"),
    ("cgroups", "use --cpus, --cpu-shares and --host-memory"),
    ("chrootdirs", "use -v"),
    ("conmon-pidfile", "`husk inspect` shows the PID of the machine's husk process"),
    ("cpu-count", ONLY_WINDOWS),
    ("cpu-percent", ONLY_WINDOWS),
    ("cpu-rt-period", "run husk with `chrt` for a real-time priority"),
    ("cpu-rt-runtime", "run husk with `chrt` for a real-time priority"),
    ("cpuset-mems", "use `numactl --membind=NODES husk run …`"),
    ("creds", CREDENTIALS),
    ("decryption-key", "encrypted images are not supported"),
    ("device", OWN_DEVICES),
    ("device-cgroup-rule", OWN_DEVICES),
    ("device-read-bps", DISK_LIMITS),
    ("device-read-iops", DISK_LIMITS),
    ("device-write-bps", DISK_LIMITS),
    ("device-write-iops", DISK_LIMITS),
    ("env-host", "use -e NAME for each variable of the host"),
    ("env-merge", "use -e NAME=VALUE"),
    ("gidmap", USER_IDS),
    ("gpus", "a machine has no access to the host's GPUs"),
    ("group-entry", "-u takes a UID and a GID that are not listed"),
    ("health-on-failure", "use `husk events --filter event=health_status`, or an --health-cmd that ends the command"),
    ("hooks-dir", "husk runs no hooks"),
    ("hostuser", USER_IDS),
    ("http-proxy", "use -e http_proxy"),
    ("image-volume", "use -v or --tmpfs"),
    ("init-ctr", "there are no pods"),
    ("init-path", "husk's init is part of husk; use --os-init to run an init of the image"),
    ("io-maxbandwidth", ONLY_WINDOWS),
    ("io-maxiops", ONLY_WINDOWS),
    ("ip6", "networks have IPv4 addresses only"),
    ("link", "connect both machines to a network (`husk network create`), on which they have names"),
    ("link-local-ip", "use --network tap=NAME,ip=ADDRESS/PREFIX"),
    ("no-hosts", "use -v with an /etc/hosts of your own"),
    ("oom-score-adj", "use `choom -n N -- husk run …`"),
    ("os", "machines are linux/amd64"),
    ("override-arch", "machines are linux/amd64"),
    ("passwd", "-u takes a UID and a GID that are not listed"),
    ("passwd-entry", "-u takes a UID and a GID that are not listed"),
    ("personality", "use `setarch` in the machine"),
    ("pidfile", "`husk inspect` shows the PID of the machine's husk process"),
    ("pod", "there are no pods: connect machines to a network (`husk network create`)"),
    ("pod-id-file", "there are no pods: connect machines to a network (`husk network create`)"),
    ("preserve-fds", "use -i, -v or `husk cp`"),
    ("rdt-class", "use --cpuset and --cpu-shares"),
    ("read-only-tmpfs", "use --tmpfs /run --tmpfs /tmp"),
    ("replace", "run `husk rm -f NAME` first"),
    ("requires", "start the other machine first"),
    ("rmi", "run `husk rmi IMAGE` afterwards"),
    ("rootfs", "give the directory as IMAGE"),
    ("runtime", "husk is the runtime"),
    ("sdnotify", "a machine that runs in the background has started its command when `husk run -d` returns"),
    ("seccomp-policy", "a machine has a kernel of its own, whose system calls husk does not filter"),
    ("secret", "use -v FILE:/run/secrets/NAME:ro"),
    ("shm-size-systemd", "use --tmpfs"),
    ("storage-opt", "use --scratch SIZE"),
    ("subgidname", USER_IDS),
    ("subuidname", USER_IDS),
    ("systemd", "use --os-init PATH to run an init of the image, such as /sbin/init"),
    ("timeout", "use `timeout SECONDS husk run …`"),
    ("tls-verify", "plain HTTP is for registries on this host only; certs.d has the certificates of others"),
    ("tz", "use -e TZ=ZONE"),
    ("uidmap", USER_IDS),
    ("umask", "use `sh -c 'umask …; exec …'`"),
    ("unsetenv", "use -e NAME= for an empty value"),
    ("use-api-socket", "there is no daemon whose socket could be shared"),
];

/// Why a machine cannot have `option`, with its dashes and possibly a value, or what to type instead.
pub fn refusal(option: &str) -> Option<&'static str> {
    let name = option.strip_prefix("--")?.split('=').next()?;
    REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    /// The flags of the table in docs/docker.md, and what husk does with them.
    fn documented() -> Vec<(&'static str, &'static str)> {
        let rows = include_str!("../../../docs/docker.md").lines().filter_map(|line| line.strip_prefix("| `--"));
        let row = |row: &'static str| {
            let mut cells = row.split('|').map(str::trim);
            Some((cells.next()?.split(['`', ' ']).next()?, cells.next()?))
        };
        rows.filter_map(row).collect()
    }

    #[test]
    fn the_documented_flags_are_those_that_are_parsed() {
        let mut cli = Cli::command();
        cli.build();
        let run = cli.find_subcommand("run").unwrap();
        let known: BTreeSet<&str> = run
            .get_arguments()
            .flat_map(|arg| {
                arg.get_long_and_visible_aliases()
                    .unwrap_or_default()
                    .into_iter()
                    .chain(arg.get_all_aliases().unwrap_or_default())
            })
            .collect();
        let documented = documented();
        assert!(documented.len() > 150, "{}", documented.len());
        for (flag, what) in &documented {
            match *what {
                "works" | "satisfied" => assert!(known.contains(flag), "--{flag} is unknown"),
                "refused" => assert!(!known.contains(flag) && refusal(&format!("--{flag}=x")).is_some(), "--{flag}"),
                other => panic!("--{flag}: {other}"),
            }
        }
        let listed = |wanted: &str| {
            documented.iter().filter(|(_, what)| *what == wanted).map(|(flag, _)| *flag).collect::<BTreeSet<_>>()
        };
        assert_eq!(listed("satisfied"), IDLE.iter().map(|idle| idle.long).collect());
        assert_eq!(listed("refused"), REFUSED.iter().map(|(flag, _)| *flag).collect());
        let own: Vec<&str> = run.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(Arg::get_long).collect();
        let missing: Vec<&&str> =
            own.iter().filter(|flag| !documented.iter().any(|(listed, _)| listed == *flag)).collect();
        assert!(missing.is_empty(), "docs/docker.md does not list {missing:?}");
    }

    #[derive(Debug, Parser)]
    struct Only {
        #[arg(long)]
        cpus: Option<u32>,
        #[arg(long)]
        from: Option<u32>,
        #[command(flatten)]
        docker: DockerFlags,
    }

    fn parsed(words: &[&str]) -> Result<DockerFlags, String> {
        let parsed = Only::try_parse_from([&["x"], words].concat());
        parsed.map(|only| only.docker).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_machine_has_anyway_is_accepted_and_nothing_else() {
        let words =
            ["--init", "--privileged", "--ipc=private", "--pid", "private", "--memory-swap", "-1", "-a", "STDOUT"];
        parsed(&words).unwrap();
        parsed(&["--init=false", "--init=1", "--sig-proxy", "--userns=host", "--detach-keys=ctrl-x"]).unwrap();
        for (word, reason) in [
            ("--ipc=host", "a kernel of its own"),
            ("--pid=container:x", "a kernel of its own"),
            ("--oom-kill-disable", "use -m"),
            ("--log-driver=syslog", "husk logs"),
            ("--init=/sbin/init", "use --os-init /sbin/init"),
            ("--privileged=maybe", "use true or false"),
        ] {
            let error = parsed(&[word]).unwrap_err();
            assert!(error.contains(reason), "{word}: {error}");
        }
    }

    #[test]
    fn only_the_streams_that_are_named_are_attached() {
        let attached = |words: &[&str]| {
            let Attached { stdin, stdout, stderr, .. } = parsed(words).unwrap().attached();
            [stdin, stdout, stderr]
        };
        assert_eq!(attached(&[]), [true; 3]);
        assert_eq!(attached(&["-a", "STDOUT"]), [false, true, false]);
        assert_eq!(attached(&["-a", "stdin", "--attach=stderr"]), [true, false, true]);
        let proxies = |words: &[&str]| parsed(words).unwrap().sig_proxy;
        assert!(proxies(&[]) && proxies(&["--sig-proxy"]) && !proxies(&["--sig-proxy=false"]));
    }

    #[test]
    fn a_quota_is_a_number_of_cpus() {
        let cpus = |words: &[&str]| parsed(words).unwrap().cpus().unwrap();
        assert_eq!(cpus(&[]), None);
        assert_eq!(cpus(&["--cpu-quota=50000"]), Some(Cpus { vcpus: 1, limit_millicpus: Some(500) }));
        assert_eq!(
            cpus(&["--cpu-quota=400000", "--cpu-period=200000"]),
            Some(Cpus { vcpus: 2, limit_millicpus: None })
        );
        assert!(parsed(&["--cpu-quota=50000", "--cpus=1"]).is_err() && parsed(&["--cpu-quota=1"]).is_err());
    }
}
