//! Flags of `husk run` that husk's init carries out in the guest: names, kernel parameters, and what the process may do.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use husk_protocol::{CallFilter, Rights, Tmpfs};

use crate::cli::size;
use crate::config::Publish;
use crate::guest::seccomp::Profile;
use crate::guest::{capability, check_hostname, process};
use crate::state_dir::identity::Names;

// In Docker's words.
#[derive(Debug, Default, Args)]
pub(in crate::cli) struct GuestSettings {
    /// Add a host name to /etc/hosts; host-gateway is an address of the host; can be repeated
    #[arg(long, value_name = "NAME:IP|host-gateway", value_parser = extra_host)]
    add_host: Vec<(String, Option<IpAddr>)>,

    /// Set a DNS search domain instead of the host's, `.` for none; can be repeated
    #[arg(long, value_name = "DOMAIN", value_parser = word)]
    dns_search: Vec<String>,

    /// Set an option of the DNS resolver instead of the host's; can be repeated
    #[arg(long, alias = "dns-opt", value_name = "OPTION", value_parser = word)]
    dns_option: Vec<String>,

    /// Domain name of the machine
    #[arg(long, value_name = "NAME")]
    domainname: Option<String>,

    /// Publish all exposed ports, those of the image and of --expose, to free ports of the host, which `husk port` shows
    #[arg(short = 'P', long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    publish_all: Option<bool>,

    /// Expose a port or a range of ports, for --publish-all; can be repeated
    #[arg(long, value_name = "PORT[-LAST][/udp]", value_parser = exposed)]
    expose: Vec<String>,

    /// Set a kernel parameter of the machine; can be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = sysctl)]
    sysctl: Vec<(String, String)>,

    /// Size of /dev/shm [default: half of the guest memory]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    shm_size: Option<u64>,

    /// Add the command's user to a group; can be repeated
    #[arg(long, value_name = "GROUP|GID")]
    group_add: Vec<String>,

    /// Add a capability; without --cap-drop, root has all of them in its machine
    #[arg(long, value_name = "NAME|ALL", value_parser = capability::mask, hide_short_help = true)]
    cap_add: Vec<u64>,

    /// Drop a capability, for the command and all others in the machine; can be repeated
    #[arg(long, value_name = "NAME|ALL", value_parser = capability::mask)]
    cap_drop: Vec<u64>,

    /// no-new-privileges keeps programs from gaining privileges when they are executed; options that loosen a
    /// container's confinement have no effect; seccomp=FILE filters the system calls of the command by a profile of Docker's
    #[arg(long, value_name = "OPTION", value_parser = security_option)]
    security_opt: Vec<SecurityOption>,

    /// Limit the number of processes and threads; 0 and -1 are unlimited
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum SecurityOption {
    NoNewPrivileges(bool),
    /// The file of a profile, if there is one.
    Seccomp(Option<PathBuf>),
    /// A machine is not confined in this way.
    None,
}

impl GuestSettings {
    /// What the process may do.
    pub fn rights(&self) -> Result<Rights> {
        let union = |masks: &[u64]| masks.iter().fold(0, |all, mask| all | mask);
        let unlimited = self.pids_limit.is_none_or(|limit| matches!(limit, 0 | -1));
        let processes_max = self.pids_limit.filter(|_| !unlimited).map(u32::try_from).transpose();
        ensure!(processes_max.is_ok(), "--pids-limit: use a number of processes, or -1 for no limit");
        let last = |wanted: fn(&&SecurityOption) -> bool| self.security_opt.iter().rev().find(wanted);
        let privileges = last(|option| matches!(option, SecurityOption::NoNewPrivileges(_)));
        let profile = last(|option| matches!(option, SecurityOption::Seccomp(_)));
        let dropped_capabilities = union(&self.cap_drop) & !union(&self.cap_add);
        let filter = match profile {
            Some(SecurityOption::Seccomp(Some(path))) => Some(filter(path, !dropped_capabilities)?),
            _ => None,
        };
        Ok(Rights {
            groups: self.group_add.clone(),
            dropped_capabilities,
            no_new_privileges: privileges == Some(&SecurityOption::NoNewPrivileges(true)),
            filter,
            processes_max: processes_max.ok().flatten(),
        })
    }

    /// The names that the machine knows, in addition to those of its networks.
    pub fn names(&self) -> Result<Names> {
        if let Some(domain) = &self.domainname {
            check_hostname(domain)?;
        }
        Ok(Names {
            hosts: self.add_host.clone(),
            search: self.dns_search.clone(),
            options: self.dns_option.clone(),
            domain: self.domainname.clone(),
        })
    }

    /// The ports that are to be published if the image exposes `ports`.
    pub fn exposed<'a>(&'a self, ports: &'a [String]) -> impl Iterator<Item = &'a String> {
        let is_wanted = self.publish_all == Some(true);
        ports.iter().chain(&self.expose).filter(move |_| is_wanted)
    }

    /// The kernel parameters.
    pub fn sysctls(&self) -> Vec<(String, String)> {
        let domain = self.domainname.iter().map(|domain| ("kernel.domainname".to_owned(), domain.clone()));
        domain.chain(self.sysctl.iter().cloned()).collect()
    }

    /// The mounts.
    pub fn tmpfs(&self) -> Result<Option<Tmpfs>> {
        let mount = |bytes: u64| process::tmpfs(&format!("/dev/shm:size={bytes},mode=1777"));
        self.shm_size.map(mount).transpose().map_err(anyhow::Error::msg)
    }
}

/// Parses `NAME:IP`, or `NAME=IP`. No address stands for the host's.
fn extra_host(text: &str) -> Result<(String, Option<IpAddr>), String> {
    let wrong = || format!("{text:?} is not a name and an address: use NAME:IP, or NAME:host-gateway");
    let (name, address) = text.split_once(['=', ':']).ok_or_else(wrong)?;
    check_hostname(name).map_err(|error| error.to_string())?;
    let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
    let address = match bare {
        "host-gateway" => None,
        other => Some(other.parse().map_err(|_| wrong())?),
    };
    Ok((name.to_owned(), address))
}

/// Checks `PORT[-LAST][/tcp|/udp]`.
fn exposed(text: &str) -> Result<String, String> {
    match text.parse() {
        Ok(Publish::Chosen { host_ip: None, from: None, .. }) => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not a port: use a number or a range, such as 80 or 5000-5009/udp")),
    }
}

/// A word of resolv.conf(5).
fn word(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_graphic() && !matches!(c, '#' | ';');
    let is_word = !text.is_empty() && text.chars().all(good);
    is_word.then(|| text.to_owned()).ok_or_else(|| format!("{text:?} is not a word of resolv.conf"))
}

fn sysctl(text: &str) -> Result<(String, String), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '_' | '-' | ':');
    let parts = text.split_once('=').filter(|(name, _)| {
        let is_path = name.split(['/', '.']).all(|part| !part.is_empty());
        is_path && name.chars().all(good)
    });
    let (name, value) = parts.ok_or_else(|| {
        format!("{text:?} is not a kernel parameter: use NAME=VALUE, such as net.core.somaxconn=1024")
    })?;
    Ok((name.to_owned(), value.to_owned()))
}

fn security_option(text: &str) -> Result<SecurityOption, String> {
    let (name, value) = text.split_once(['=', ':']).unwrap_or((text, ""));
    match (name, value) {
        ("no-new-privileges", "" | "true") => Ok(SecurityOption::NoNewPrivileges(true)),
        ("no-new-privileges", "false") => Ok(SecurityOption::NoNewPrivileges(false)),
        ("seccomp", "unconfined") => Ok(SecurityOption::Seccomp(None)),
        ("apparmor" | "systempaths", "unconfined") | ("label", "disable") | ("unmask", _) => Ok(SecurityOption::None),
        ("seccomp", path) if !path.is_empty() => Ok(SecurityOption::Seccomp(Some(path.into()))),
        _ => Err(format!(
            "{text:?}: a machine has a kernel of its own, which husk does not confine: use no-new-privileges, seccomp=FILE or --cap-drop"
        )),
    }
}

/// The filter of a profile, for a process that can get these capabilities.
fn filter(profile: &Path, capabilities: u64) -> Result<CallFilter> {
    let file = || format!("the seccomp profile {}", profile.display());
    let json = fs::read(profile).with_context(|| format!("read {}", file()))?;
    Profile::parse(&json).and_then(|profile| profile.compile(capabilities)).with_context(file)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        settings: GuestSettings,
    }

    fn settings(words: &[&str]) -> Result<GuestSettings, String> {
        let parsed = Cli::try_parse_from([&["x"], words].concat());
        parsed.map(|cli| cli.settings).map_err(|error| error.to_string())
    }

    #[test]
    fn capabilities_are_dropped_unless_they_are_added() {
        let dropped = |words: &[&str]| settings(words).unwrap().rights().unwrap().dropped_capabilities;
        assert_eq!((dropped(&[]), dropped(&["--cap-add=ALL"])), (0, 0));
        assert_eq!(dropped(&["--cap-drop=KILL", "--cap-drop=CHOWN", "--cap-add=CHOWN"]), 1 << 5);
        let all_but_one = dropped(&["--cap-drop", "all", "--cap-add", "NET_BIND_SERVICE"]);
        assert_eq!((all_but_one.count_ones(), all_but_one >> 10 & 1), (40, 0));
    }

    #[test]
    fn rights_have_dockers_words() {
        let rights = |words: &[&str]| settings(words).unwrap().rights();
        let words = ["--security-opt=no-new-privileges", "--security-opt=label=disable", "--pids-limit=9"];
        let given = rights(&[&words[..], &["--group-add=audio", "--group-add=44"]].concat()).unwrap();
        assert_eq!((given.no_new_privileges, given.processes_max), (true, Some(9)));
        assert_eq!(given.groups, ["audio", "44"]);
        for unlimited in ["--pids-limit=-1", "--pids-limit=0", "--security-opt=seccomp=unconfined"] {
            assert_eq!(rights(&[unlimited]).unwrap(), Rights::default(), "{unlimited}");
        }
        assert!(rights(&["--pids-limit=-2"]).is_err());
        assert!(settings(&["--security-opt=apparmor=x"]).unwrap_err().contains("--cap-drop"));
        let refusal = rights(&["--security-opt=seccomp=/none.json"]).unwrap_err();
        assert_eq!(
            format!("{refusal:#}"),
            "read the seccomp profile /none.json: No such file or directory (os error 2)"
        );
        let dir = tempfile::tempdir().unwrap();
        let profile = dir.path().join("profile.json");
        fs::write(&profile, r#"{ "defaultAction": "SCMP_ACT_ALLOW" }"#).unwrap();
        let option = format!("--security-opt=seccomp={}", profile.display());
        assert!(
            rights(&["--security-opt=label=disable", &option, "--security-opt=no-new-privileges"])
                .unwrap()
                .filter
                .is_some()
        );
    }

    #[test]
    fn names_are_for_line_based_files() {
        let address = |text: &str| text.parse::<IpAddr>().ok();
        assert_eq!(extra_host("db:10.0.0.1"), Ok(("db".into(), address("10.0.0.1"))));
        assert_eq!(extra_host("db=::1"), Ok(("db".into(), address("::1"))));
        assert_eq!(extra_host("db:[fd00::1]"), Ok(("db".into(), address("fd00::1"))));
        assert_eq!(extra_host("host.docker.internal:host-gateway"), Ok(("host.docker.internal".into(), None)));
        for wrong in ["db", "db:", ":10.0.0.1", "a b:10.0.0.1", "db:10.0.0.1\n10.0.0.2 x", "db:host"] {
            assert!(extra_host(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "a b", "a\nnameserver 1.2.3.4", "#"] {
            assert!(word(wrong).is_err(), "{wrong}");
        }
        assert!(settings(&["--domainname=a b"]).unwrap().names().is_err());
    }

    #[test]
    fn a_kernel_parameter_is_in_its_directory() {
        assert_eq!(sysctl("net.core.somaxconn=9"), Ok(("net.core.somaxconn".into(), "9".into())));
        assert_eq!(sysctl("kernel/msg=1 2=3"), Ok(("kernel/msg".into(), "1 2=3".into())));
        for wrong in ["", "x", "=1", "../../etc/passwd=x", "net..x=1", "/net/x=1", "a b=1"] {
            assert!(sysctl(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shared_memory_is_for_everyone() {
        let mount = settings(&["--shm-size=64m"]).unwrap().tmpfs().unwrap().unwrap();
        assert_eq!((mount.path.as_slice(), mount.options.as_str()), (&b"/dev/shm"[..], "size=67108864,mode=1777"));
        assert_eq!(settings(&[]).unwrap().tmpfs().unwrap(), None);
    }
}
