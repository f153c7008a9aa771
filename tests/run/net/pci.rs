//! Machines whose devices are on PCI: passt, tap devices served by the host's kernel, and the other devices beside them.

use std::fs;
use std::process::Command;

use super::{SERVED, end, is_root, networked, serve, start};
use crate::guests;
use crate::image::run;
use crate::uplink::host;

#[test]
fn every_device_of_a_machine_works_on_pci() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let server = serve(host);
    // The stock kernel has its drivers as modules, found in the host's tree as well.
    for kernel in ["micro", "stock", "host"] {
        let script = format!(
            "ls /sys/bus/pci/devices | wc -l; grep -c PCI-MSI /proc/interrupts; ls -d /sys/devices/LNRO* 2>/dev/null
             echo written >/tmp/x; sync; cat /tmp/x; wget -qO- http://{server}/; exit 7"
        );
        let flags = ["--transport", "pci", "--cpus", "2"];
        let ended = networked(&guests, kernel, &flags, &script);
        let text = ended.expect(7).text();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let [devices, vectors, rest @ ..] = &lines[..] else { panic!("{text}") };
        // The bridge, a disk or two, entropy, vsock, balloon and network.
        assert!(devices.parse::<u32>().unwrap() >= 6, "{kernel}: {text}");
        assert!(vectors.parse::<u32>().unwrap() >= 10, "one vector per queue of {kernel}: {text}");
        assert_eq!(rest, ["written", SERVED.trim()], "{kernel}: {}", ended.errors);
    }
}

#[test]
fn the_kernel_serves_a_tap_device_on_pci() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    let vhost = if fs::exists("/dev/vhost-net").unwrap() { "on" } else { "off" };
    let network = format!("tap=husk-pci,vhost={vhost},ip=198.18.9.2/24,gateway=198.18.9.1");
    let flags = ["--transport", "pci", "--cpus", "2", "--network", &network];
    let (machine, _output) = start(&guests, &flags, "iperf3 -s -D; echo ready; exec sleep 1000");
    run(Command::new("ip").args(["addr", "add", "198.18.9.1/24", "dev", "husk-pci"]));
    run(Command::new("ip").args(["link", "set", "husk-pci", "up"]));
    for direction in [&[][..], &["-R"]] {
        let mut client = Command::new("iperf3");
        client.args(["-c", "198.18.9.2", "-P", "2", "-n", "8M", "-J"]).args(direction);
        let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
        // The client stops counting when it has sent all of it, of which less than half may have arrived.
        assert!(report["end"]["sum_received"]["bytes"].as_u64().unwrap() >= 1 << 20, "{}", report["end"]);
        eprintln!("tap on PCI {direction:?}: {} bit/s", report["end"]["sum_received"]["bits_per_second"]);
    }
    end(machine);
}
