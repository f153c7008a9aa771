//! Statistics of a container as containerd takes them: those of a cgroup v2, which it has in its guest.

use prost::Message;

use super::messages::{Any, CpuStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use crate::cli::oci::operations::Data;

const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

pub fn pack(data: &Data) -> Any {
    let metrics = Metrics {
        pids: data.pids.map(|current| PidsStat { current, limit: data.pids_limit.unwrap_or(0) }),
        cpu: Some(CpuStat {
            usage_usec: data.cpu_ns / 1000,
            user_usec: data.user_ns / 1000,
            system_usec: data.system_ns / 1000,
        }),
        memory: Some(MemoryStat {
            inactive_file: data.inactive_file_bytes,
            usage: data.memory_bytes,
            usage_limit: data.memory_limit_bytes,
        }),
        memory_events: Some(MemoryEvents { oom_kill: data.oom_kills }),
    };
    Any { type_url: TYPE.to_owned(), value: metrics.encode_to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_microseconds() {
        let data =
            Data { cpu_ns: 5000, memory_bytes: 7, memory_limit_bytes: u64::MAX, pids: Some(3), ..Data::default() };
        let Any { type_url, value } = pack(&data);
        let metrics = Metrics::decode(&value[..]).unwrap();
        assert_eq!(type_url, TYPE);
        assert_eq!((metrics.cpu.unwrap().usage_usec, metrics.memory.unwrap().usage), (5, 7));
        assert_eq!(metrics.pids, Some(PidsStat { current: 3, limit: 0 }));
    }
}
