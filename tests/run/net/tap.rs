//! Tap devices, served by husk and by the host's kernel.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{end, husk, is_root, networked, start, start_under};
use crate::image::run;
use crate::uplink::is_lab;
use crate::{guests, monitor_of};

#[test]
fn a_tap_device_carries_routed_traffic() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    let flags = ["--rm", "--name", "tapped", "--network", "tap=husk-tap,ip=198.18.7.2/24,gateway=198.18.7.1"];
    let script = "iperf3 -s -D; mkdir /www; echo from the guest >/www/index.html; httpd -p 80 -h /www; echo ready; exec sleep 1000";
    let (machine, _output) = start(&guests, &flags, script);
    // It was created with the machine, and is configured by the host.
    run(Command::new("ip").args(["addr", "add", "198.18.7.1/24", "dev", "husk-tap"]));
    run(Command::new("ip").args(["link", "set", "husk-tap", "up"]));
    let page = run(Command::new("curl").args(["-sS", "--max-time", "60", "http://198.18.7.2/"]));
    assert_eq!(page, "from the guest\n");
    // Sets the link down, and up again.
    let asks =
        |patience_s: &str| Command::new("curl").args(["-sS", "--max-time", patience_s, "http://198.18.7.2/"]).output();
    husk(&["update", "--link", "down", "tapped"]);
    assert!(!asks("3").unwrap().status.success(), "it is cut off");
    husk(&["update", "--link", "up", "tapped"]);
    assert_eq!(asks("60").unwrap().stdout, b"from the guest\n");
    let stats: serde_json::Value = serde_json::from_str(&husk(&["stats", "--json", "tapped"])).unwrap();
    assert!(
        stats[0]["net_received_bytes"].as_u64() > Some(0) && stats[0]["net_sent_bytes"].as_u64() > Some(0),
        "{stats}"
    );
    for direction in [&[][..], &["-R"]] {
        let mut client = Command::new("iperf3");
        client.args(["-c", "198.18.7.2", "-n", "16M", "-J"]).args(direction);
        let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
        // The last packets may be in flight when counting ends.
        assert!(report["end"]["sum_received"]["bytes"].as_u64().unwrap() >= 8 << 20, "{}", report["end"]);
        eprintln!("tap {direction:?}: {} bit/s", report["end"]["sum_received"]["bits_per_second"]);
    }
    // More than 1500 bytes at a time were transferred: segmentation was offloaded.
    let count = |name: &str| {
        let path = format!("/sys/class/net/husk-tap/statistics/{name}");
        fs::read_to_string(path).unwrap().trim().parse::<u64>().unwrap()
    };
    assert!(count("tx_bytes") / count("tx_packets") > 1514, "{} {}", count("tx_bytes"), count("tx_packets"));
    let second = networked(&guests, "micro", &["--network", "tap=husk-tap"], "true");
    assert!(second.expect(125).errors.contains("another machine is using it"), "{}", second.errors);
    end(machine);
    assert!(!Path::new("/sys/class/net/husk-tap").exists(), "it goes with its machine");
}

#[test]
fn a_tap_device_has_a_pair_of_queues_for_each_vcpu() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    // Served by husk; the test below uses the kernel.
    let network = "tap=husk-pairs,vhost=off,ip=198.18.8.2/24,gateway=198.18.8.1";
    let flags = ["--rm", "--name", "pairs", "--cpus", "2", "--network", network];
    let (machine, _output) = start(&guests, &flags, "iperf3 -s -D; echo ready; exec sleep 1000");
    run(Command::new("ip").args(["addr", "add", "198.18.8.1/24", "dev", "husk-pairs"]));
    run(Command::new("ip").args(["link", "set", "husk-pairs", "up"]));
    let queues = fs::read_dir("/sys/class/net/husk-pairs/queues").unwrap().flatten();
    let sends = queues.filter(|queue| queue.file_name().to_string_lossy().starts_with("tx-"));
    assert_eq!(sends.count(), 2, "the guest's driver asked for them");
    // The kernel would distribute the frames between the machines.
    let second = networked(&guests, "micro", &["--network", "tap=husk-pairs"], "true");
    assert!(second.expect(125).errors.contains("another machine is using it"), "{}", second.errors);
    let transfer = |flags: &[&str]| {
        let mut client = Command::new("iperf3");
        client.args(["-c", "198.18.8.2", "-P", "2", "-n", "8M", "-J"]).args(flags);
        let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
        let received = &report["end"]["sum_received"];
        // The last packets may be in flight when counting ends.
        assert!(received["bytes"].as_u64().unwrap() >= 4 << 20, "{}", report["end"]);
        eprintln!("two pairs {flags:?}: {} bit/s", received["bits_per_second"]);
    };
    transfer(&[]);
    transfer(&["-R"]);
    husk(&["pause", "pairs"]);
    husk(&["unpause", "pairs"]);
    transfer(&[]);
    end(machine);
}

/// Whether the host has vhost-net, as the lab does; prints a visible message if not.
fn has_vhost() -> bool {
    let has = Path::new("/dev/vhost-net").exists();
    assert!(has || !is_lab(), "the lab has lost its vhost-net");
    if !has {
        eprintln!("SKIPPED: this host has no vhost-net");
    }
    has
}

/// Waits until the host's kernel serves this number of the machine's interfaces.
fn wait_until_kernel_serves(interfaces: u64, machine: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats: serde_json::Value = serde_json::from_str(&husk(&["stats", "--json", machine])).unwrap();
        if stats[0]["net_vhost_interfaces"].as_u64() == Some(interfaces) {
            return;
        }
        assert!(Instant::now() < deadline, "{stats}");
    }
}

/// The number of vhost threads of process `pid`: kernel threads, or since Linux 6.4 threads of the process. They are
/// named after the thread that created them.
fn vhost_threads(pid: &str) -> usize {
    let own = format!("/proc/{pid}/task");
    let maker = |comm: &str| comm.strip_prefix("vhost-").map(|tid| Path::new(&own).join(tid.trim()));
    let works = |task: &Path| {
        let comm = fs::read_to_string(task.join("comm")).unwrap_or_default();
        maker(&comm).is_some_and(|thread| thread.exists())
    };
    let tasks = ["/proc", &own].map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    tasks.into_iter().flatten().filter(|task| works(&task.path())).count()
}

#[test]
fn vhost_serves_a_tap_device_unless_a_feature_is_missing() {
    let guests = guests!();
    if !is_root() || !has_vhost() {
        return;
    }
    let network = "tap=husk-vhost,vhost=on,ip=198.18.9.2/24,gateway=198.18.9.1";
    let script = "iperf3 -s -D; mkdir /www; head -c 2000000 /dev/zero >/www/big; httpd -p 80 -h /www; echo ready; exec sleep 1000";
    // One queue pair under the stock kernel, and two.
    for (kernel, cpus, threads) in [("stock", "1", 1), ("micro", "2", 2)] {
        let flags = ["--rm", "--name", "vhosted", "--cpus", cpus, "--network", network];
        let (machine, _output) = start_under(kernel, &guests, &flags, script);
        run(Command::new("ip").args(["addr", "add", "198.18.9.1/24", "dev", "husk-vhost"]));
        run(Command::new("ip").args(["link", "set", "husk-vhost", "up"]));
        let page = |patience_s: &str| {
            let mut curl = Command::new("curl");
            curl.args(["-sS", "--max-time", patience_s, "http://198.18.9.2/big"]).output().unwrap().stdout.len()
        };
        let counted = |name: &str| {
            let stats: serde_json::Value = serde_json::from_str(&husk(&["stats", "--json", "vhosted"])).unwrap();
            stats[0][name].as_u64().unwrap()
        };
        wait_until_kernel_serves(1, "vhosted");
        assert_eq!(vhost_threads(&monitor_of(&machine.id().to_string())), threads, "a thread for each pair of queues");
        assert_eq!(page("60"), 2_000_000);
        for direction in [&[][..], &["-R"]] {
            let mut client = Command::new("iperf3");
            client.args(["-c", "198.18.9.2", "-P", cpus, "-n", "16M", "-J"]).args(direction);
            let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
            assert!(report["end"]["sum_received"]["bytes"].as_u64().unwrap() >= 8 << 20, "{}", report["end"]);
        }
        let (received, sent) = (counted("net_received_bytes"), counted("net_sent_bytes"));
        assert!(received > 8 << 20 && sent > 10 << 20, "{received} {sent}");
        // During a transfer, which continues.
        let mut transferred = 0;
        for (change, back) in [
            (&["update", "--network-bps", "20M"][..], &["update", "--network-bps", "none"][..]),
            (&["pause"], &["unpause"]),
            (&["update", "--link", "down"], &["update", "--link", "up"]),
        ] {
            let mut client = Command::new("iperf3");
            client.args(["-c", "198.18.9.2", "-n", "32M", "-J"]).stdout(Stdio::piped());
            let client = client.spawn().unwrap();
            thread::sleep(Duration::from_millis(300));
            husk(&[change, &["vhosted"]].concat());
            wait_until_kernel_serves(0, "vhosted");
            husk(&[back, &["vhosted"]].concat());
            wait_until_kernel_serves(1, "vhosted");
            let output = client.wait_with_output().unwrap();
            assert!(output.status.success(), "{change:?}: {}", String::from_utf8_lossy(&output.stdout));
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            transferred += report["end"]["sum_received"]["bytes"].as_u64().unwrap();
            assert_eq!(page("60"), 2_000_000, "{change:?}");
        }
        let counted_since = counted("net_received_bytes") - received;
        assert!(counted_since > transferred, "all of them are counted: {counted_since} of {transferred}");
        husk(&["update", "--link", "down", "vhosted"]);
        assert_eq!(page("2"), 0, "it is cut off");
        end(machine);
    }
    let off = networked(&guests, "micro", &["--network", "tap=husk-vhost,vhost=on,bps=10M"], "true");
    assert!(off.expect(125).errors.contains("vhost=on cannot be combined"), "{}", off.errors);
}
