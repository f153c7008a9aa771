//! Reads the size of a mapping of this process, for tests (proc_pid_smaps(5)).

/// The value of `name`, such as `Rss:`, in bytes, of the mapping that contains `address`.
pub fn bytes_at(address: usize, name: &str) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let number = |text| usize::from_str_radix(text, 16).ok();
        !range.is_some_and(|(start, end)| (number(start)..number(end)).contains(&Some(address)))
    });
    let value = lines.find_map(|line| line.strip_prefix(name)).unwrap();
    value.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}
