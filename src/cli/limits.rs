//! Flags that limit a machine's use of the host, shared by all commands that start one.

use clap::Args;

use super::size;
use crate::config::{HugePages, MachineConfig};

// Limits in addition to `--cpus` and `--memory`.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct LimitFlags {
    /// Host CPUs in which to allow execution (0-2,4)
    #[arg(long, alias = "cpuset-cpus", value_name = "LIST", value_parser = cpuset)]
    cpuset: Option<Cpuset>,

    /// CPU shares (relative weight); the default weight is 1024
    #[arg(short = 'c', long, value_name = "N")]
    cpu_shares: Option<u32>,

    /// Maximum guest memory for `husk update --memory`; --memory is then the initial size
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib, allow_negative_numbers = true)]
    memory_max: Option<u64>,

    /// Disable the memory balloon, which returns unused guest memory to the host
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_balloon: Option<bool>,

    /// Back guest memory with transparent huge pages (thp, the default), with pages of 2M or 1G from the host's pool,
    /// which the balloon cannot return, or with small pages only (off)
    #[arg(long, value_name = "thp|2M|1G|off", value_parser = huge_pages)]
    hugepages: Option<HugePages>,

    /// Allocate all guest memory before the guest starts, and keep pages that it frees
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    prefault: Option<bool>,

    /// Limit the host memory of the whole machine, including husk itself; auto is the amount it needs
    #[arg(long, value_name = "SIZE|auto", value_parser = host_memory, allow_negative_numbers = true)]
    host_memory: Option<HostMemory>,

    /// Confine the processes that run the guest and that unpack the image: on (the default), or off to debug them
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    sandbox: Option<bool>,
}

/// CPU numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cpuset(pub(super) Vec<u32>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostMemory {
    /// The amount that the machine needs.
    Auto,
    /// This amount in MiB.
    Mib(u64),
}

impl LimitFlags {
    /// Whether processes are confined.
    pub fn sandbox(&self) -> bool {
        self.sandbox.unwrap_or(true)
    }

    /// Takes what the guest sees of the limits of `config`, unless there are flags.
    pub fn adopt(&mut self, config: &MachineConfig) {
        self.no_balloon.get_or_insert(!config.balloon);
        self.hugepages.get_or_insert(config.huge_pages);
        self.prefault.get_or_insert(config.prefault);
        if config.memory_target_mib.is_some() {
            self.memory_max.get_or_insert(config.memory_mib);
        }
    }

    /// Applies the flags to `config`, which already has all of its devices. `memory_mib` is the value of `--memory`, if
    /// given.
    pub fn apply(&self, memory_mib: Option<u64>, config: &mut MachineConfig) {
        if let Some(Cpuset(cpus)) = &self.cpuset {
            config.cpuset.clone_from(cpus);
        }
        config.cpu_shares = self.cpu_shares.or(config.cpu_shares);
        config.balloon = self.no_balloon.map_or(config.balloon, |off| !off);
        config.huge_pages = self.hugepages.unwrap_or(config.huge_pages);
        config.prefault = self.prefault.unwrap_or(config.prefault);
        config.sandbox = self.sandbox.unwrap_or(config.sandbox);
        let target_mib = memory_mib.or(config.memory_target_mib);
        if let Some(max_mib) = self.memory_max {
            config.memory_target_mib = Some(target_mib.unwrap_or(config.memory_mib));
            config.memory_mib = max_mib;
        } else if config.memory_target_mib.is_some() {
            config.memory_target_mib = target_mib;
        } else if let Some(memory_mib) = memory_mib {
            config.memory_mib = memory_mib;
        }
        match self.host_memory {
            Some(HostMemory::Auto) => config.host_memory_mib = Some(config.host_memory_needed_mib()),
            Some(HostMemory::Mib(mib)) => config.host_memory_mib = Some(mib),
            None => {}
        }
    }
}

/// Parses a CPU list in the syntax of taskset and Docker.
pub(super) fn cpuset(text: &str) -> Result<Cpuset, String> {
    // More than any host has, and few enough to list.
    const CPU_MAX: u32 = 8191;
    let malformed = || format!("{text:?} is not a list of CPUs: use numbers and ranges, such as 0-2,4");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|cpu| digits && *cpu <= CPU_MAX).ok_or_else(malformed)
        };
        let (first, last): (u32, u32) = (number(first)?, number(last)?);
        if first > last {
            return Err(malformed());
        }
        cpus.extend(first..=last);
        // Ranges may overlap.
        cpus.sort_unstable();
        cpus.dedup();
    }
    Ok(Cpuset(cpus))
}

fn huge_pages(text: &str) -> Result<HugePages, String> {
    match text.to_ascii_lowercase().as_str() {
        "thp" => Ok(HugePages::Transparent),
        "2m" | "2mib" => Ok(HugePages::Size2M),
        "1g" | "1gib" => Ok(HugePages::Size1G),
        "off" => Ok(HugePages::Off),
        _ => Err("use thp, 2M, 1G or off".to_owned()),
    }
}

fn host_memory(text: &str) -> Result<HostMemory, String> {
    if text == "auto" {
        return Ok(HostMemory::Auto);
    }
    size::memory_mib(text).map(HostMemory::Mib).map_err(|error| format!("{error}, or auto"))
}

pub(super) fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("use on or off".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        limits: LimitFlags,
    }

    fn applied(words: &[&str], memory_mib: Option<u64>, mut config: MachineConfig) -> MachineConfig {
        let cli = Cli::try_parse_from([&["husk"], words].concat()).unwrap();
        cli.limits.apply(memory_mib, &mut config);
        config
    }

    fn memory(words: &[&str], memory_mib: Option<u64>, file: (u64, Option<u64>)) -> (u64, Option<u64>) {
        let config = MachineConfig { memory_mib: file.0, memory_target_mib: file.1, ..MachineConfig::default() };
        let config = applied(words, memory_mib, config);
        (config.memory_mib, config.memory_target_mib)
    }

    #[test]
    fn memory_is_the_initial_size_and_the_maximum_is_separate() {
        let max = &["--memory-max", "2G"][..];
        assert_eq!(memory(&[], None, (512, None)), (512, None));
        assert_eq!(memory(&[], Some(256), (512, None)), (256, None));
        assert_eq!(memory(max, None, (512, None)), (2048, Some(512)));
        assert_eq!(memory(max, Some(256), (512, None)), (2048, Some(256)));
        // A file with both values.
        assert_eq!(memory(&[], None, (1024, Some(512))), (1024, Some(512)));
        assert_eq!(memory(&[], Some(256), (1024, Some(512))), (1024, Some(256)));
        assert_eq!(memory(max, None, (1024, Some(512))), (2048, Some(512)));
    }

    #[test]
    fn host_memory_is_a_size_or_automatic() {
        let config = || MachineConfig { memory_mib: 1024, ..MachineConfig::default() };
        let auto = applied(&["--host-memory", "auto", "--memory-max", "2G"], None, config());
        assert_eq!(auto.host_memory_mib, Some(2048 + 16 + 32));
        assert_eq!(applied(&["--host-memory=3G"], None, config()).host_memory_mib, Some(3072));
        assert!(host_memory("some").unwrap_err().ends_with("2GiB, or auto"));
    }

    #[test]
    fn cpu_lists_are_numbers_and_ranges() {
        let list = |text| cpuset(text).map(|cpus| cpus.0);
        assert_eq!(list("0"), Ok(vec![0]));
        assert_eq!(list("4,0-2,1"), Ok(vec![0, 1, 2, 4]));
        assert_eq!(list("0-8191,0-8191").map(|cpus| cpus.len()), Ok(8192));
        for wrong in ["", ",", "1,", "-1", "1-", "2-1", "a", "0x1", "+1", "1 ", "8192", "0-4294967295", "1-2-3", "1.5"]
        {
            assert!(list(wrong).unwrap_err().contains("such as 0-2,4"), "{wrong}");
        }
    }

    #[test]
    fn flags_override_and_unspecified_limits_are_kept() {
        let file = MachineConfig { cpuset: vec![1], cpu_shares: Some(10), balloon: false, ..MachineConfig::default() };
        let kept = applied(&[], None, file.clone());
        assert_eq!(kept, file);
        let changed = applied(&["--cpuset=0", "--cpu-shares=20"], None, file);
        assert_eq!((changed.cpuset, changed.cpu_shares, changed.balloon), (vec![0], Some(20), false));
        let huge = applied(&["--hugepages=2M", "--prefault"], None, MachineConfig::default());
        assert_eq!((huge.huge_pages, huge.prefault), (HugePages::Size2M, true));
        let kept = applied(&[], None, huge);
        assert_eq!((kept.huge_pages, kept.prefault), (HugePages::Size2M, true));
        assert!(!applied(&["--prefault=false"], None, kept).prefault);
        assert!(huge_pages("4K").is_err());
        let without = applied(&["--no-balloon"], None, MachineConfig::default());
        assert!(!without.balloon && applied(&["--no-balloon=false"], None, without).balloon);
    }
}
