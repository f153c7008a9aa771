//! Machines that are saved with a process of theirs, or before they have one, and restored several times: in this process,
//! so that nothing but their state is handed on.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ::husk::boot::Part;
use ::husk::config::{Attachment, MacAddress, MachineConfig, NetworkConfig};
use ::husk::console::hub::Hub;
use ::husk::console::stream_log::{DEFAULT_MAX_BYTES, LogReader, StreamLog};
use ::husk::exit_latch::ExitReason;
use ::husk::guest::network::{InterfaceSetup, NetworkSetup, parse_address};
use ::husk::guest::process::{self, Overrides};
use ::husk::guest::session::{Change, Endpoints, Session};
use ::husk::guest::{GuestSpec, RootFs, WritableLayer};
use ::husk::image::ImageProcess;
use ::husk::machine::Machine;
use ::husk::memory;
use ::husk::resources::guest_kernel::{Choice, GuestKernel};
use ::husk::resources::{self, Outside, Resources, SnapshotFiles, Source};
use ::husk::snapshot::Received;
use ::husk::timings::Timings;
use husk_protocol::{PORT, Route, ToHost};

use super::guests::guests;
use super::uplink::is_lab;
use super::{TIMEOUT, image};

/// A machine with its session, whose output is in a log.
struct Guest {
    machine: Machine,
    session: Session,
    config: MachineConfig,
    log: PathBuf,
    dir: tempfile::TempDir,
    _outside: Outside,
}

/// A saved machine, which can be restored any number of times.
struct Saved {
    files: SnapshotFiles,
    config: MachineConfig,
    output: String,
    received: Received,
}

/// Creates a session that listens to the guest and writes to a log.
type MakeSession<'a> = &'a dyn Fn(UnixListener, Endpoints, Arc<Timings>) -> anyhow::Result<Session>;

impl Guest {
    fn boot(config: &MachineConfig, initramfs: File, session: MakeSession) -> Guest {
        Guest::start(config, session, |config| {
            // Without the machine's devices, which are opened once.
            let kernel = MachineConfig { kernel: config.kernel.clone(), ..MachineConfig::default() };
            let (Resources { source: Source::Boot(mut files), .. }, _) = resources::open(&kernel).unwrap() else {
                unreachable!()
            };
            files.initrd = Some(Part::whole(initramfs).unwrap());
            Source::Boot(files)
        })
    }

    fn start(config: &MachineConfig, session: MakeSession, source: impl FnOnce(&MachineConfig) -> Source) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config.clone();
        config.vsock.as_mut().unwrap().socket = dir.path().join("v.sock");
        let listener = UnixListener::bind(dir.path().join(format!("v.sock_{PORT}"))).unwrap();
        let log = dir.path().join("streams.log");
        let hub = Hub::new(StreamLog::open(log.clone(), DEFAULT_MAX_BYTES).unwrap());
        let timings = Arc::new(Timings::new(Instant::now()));
        let session = session(listener, Endpoints::Hub(Arc::new(hub)), timings.clone()).unwrap();
        let (resources, outside) = resources::open_for(&config, source(&config)).unwrap();
        let mut machine = Machine::build(&config, resources, timings, || Ok(()), &|| false).unwrap();
        let console = machine.console_output().clone();
        thread::spawn(move || console.print_to(std::io::stderr(), drop));
        machine.resume();
        Guest { machine, session, config, log, dir, _outside: outside }
    }

    /// What the process has written so far.
    fn output(&self) -> String {
        output_in(&self.log)
    }

    #[track_caller]
    fn wait_until(&mut self, what: &str, happened: impl Fn(&Guest) -> bool) {
        let start = Instant::now();
        loop {
            self.session.on_ready(self.machine.exit_latch()).unwrap();
            if happened(self) {
                return;
            }
            let reason = self.machine.exit_latch().reason();
            if start.elapsed() > TIMEOUT || reason.is_some() {
                panic!("{what}: {reason:?}\n{}", self.output());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for the machine's end. Returns the process's end and its output.
    #[track_caller]
    fn finish(mut self) -> (ToHost, String) {
        self.wait_until("it has ended", |guest| guest.machine.exit_latch().reason().is_some());
        self.session.on_ready(self.machine.exit_latch()).unwrap();
        let end = self.session.end().expect("it was told").clone();
        if let ToHost::Exited(code) = end {
            assert_eq!(self.machine.exit_latch().reason(), Some(ExitReason::Reported(code)));
        }
        (end, self.output())
    }

    /// Saves the machine and ends it.
    fn save(mut self) -> Saved {
        let state = self.machine.save().unwrap().encode().unwrap();
        let memory = tempfile::tempfile().unwrap();
        memory::write_to(self.machine.memory(), &memory, None).unwrap();
        let received = self.session.received();
        drop(self.machine);
        // What has left the guest arrives.
        thread::sleep(Duration::from_millis(200));
        let output = output_in(&self.log);
        drop(self.dir);
        Saved {
            files: SnapshotFiles { state, memory, touched: None, shares: Vec::new(), added_devices: 0 },
            config: self.config,
            output,
            received,
        }
    }
}

impl Saved {
    fn restore(&self, session: MakeSession) -> Guest {
        self.restore_with(&self.config, session)
    }

    /// Restores a machine whose process has started.
    fn resume(&self) -> Guest {
        self.restore(&|listener, endpoints, timings| resumed(listener, self.received, endpoints, timings))
    }

    fn restore_with(&self, config: &MachineConfig, session: MakeSession) -> Guest {
        Guest::start(config, session, |_| Source::Snapshot(self.files.try_clone().unwrap()))
    }
}

/// The session of a machine that goes on as it was.
fn resumed(
    listener: UnixListener,
    received: Received,
    endpoints: Endpoints,
    timings: Arc<Timings>,
) -> anyhow::Result<Session> {
    let change = Change { identity: NetworkSetup::default().identity("box"), is_same: true, cut: false };
    Session::resumed(listener, received, false, change, endpoints, timings)
}

fn output_in(log: &Path) -> String {
    let (mut reader, mut output) = (LogReader::open(log), Vec::new());
    while let Some((_, content)) = reader.read().unwrap() {
        output.extend(content);
    }
    String::from_utf8(output).unwrap()
}

/// The test image's root file system, prepared by husk.
fn root() -> PathBuf {
    const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    image::run(command.args(["load", image::archive()]).env("HUSK_DATA", image::store()));
    let is_root = |path: &Path| {
        let mut magic = [0; 4];
        File::open(path).and_then(|file| file.read_exact_at(&mut magic, 1024)).is_ok() && magic == EROFS_MAGIC
    };
    let (mut dirs, mut found) = (vec![image::store()], None);
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => dirs.push(path),
                false if is_root(&path) => found = Some(path),
                false => {}
            }
        }
    }
    found.expect("husk load has made it")
}

fn kernel_of(guests: &Path) -> GuestKernel {
    Choice::from_word(&guests.join("micro/vmlinux")).find().unwrap()
}

/// A machine that runs a shell command.
fn spec(script: &str, stdin: bool, hostname: &str) -> GuestSpec {
    let defaults = Box::new(ImageProcess { env: vec!["PATH=/bin".into()], ..ImageProcess::default() });
    let root_fs =
        RootFs::Image { root: root(), identity: [0; 16], defaults, writable: WritableLayer::Memory, in_use: None };
    let command = ["sh", "-c", script].map(Into::into).to_vec();
    let overrides = Overrides { command, working_dir: Some("/made/here".into()), ..Overrides::default() };
    let tmpfs = vec![process::tmpfs("/scratch:size=1m").unwrap()];
    GuestSpec::with_process(root_fs, overrides, false, stdin, hostname.into(), tmpfs).unwrap()
}

fn config(spec: &GuestSpec, kernel: &GuestKernel) -> MachineConfig {
    spec.machine_config(kernel, 1, 96, Path::new("replaced"), false)
}

fn boot(spec: &GuestSpec, kernel: &GuestKernel) -> Guest {
    let config = config(spec, kernel);
    let initramfs = spec.initramfs(kernel, config.virtio_bus()).unwrap();
    let stdin = spec.wants_stdin();
    Guest::boot(&config, initramfs, &|listener, endpoints, timings| {
        Session::new(listener, stdin, false, endpoints, timings)
    })
}

/// Provides input until it is dropped.
fn input(guest: &mut Guest) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.session.attach_input(theirs, false).unwrap();
    ours
}

#[test]
fn a_process_goes_on_in_every_machine_that_is_restored() {
    let guests = guests!();
    let script = "echo begun >&2; while read word; do
        echo $word $(head -c 8 /dev/urandom | md5sum) $(date +%s); [ $word = end ] && exit 7; done";
    let mut guest = boot(&spec(script, true, "box"), &kernel_of(&guests));
    guest.wait_until("it has begun", |guest| guest.output() == "begun\n");
    input(&mut guest).write_all(b"first\n").unwrap();
    guest.wait_until("it has read", |guest| guest.output().contains("first"));
    let saved = guest.save();
    // The guest's clock must be set.
    thread::sleep(Duration::from_secs(3));
    let answers = [(); 2].map(|()| {
        let mut guest = saved.resume();
        guest.wait_until("it is resumed", |guest| guest.session.has_started());
        // Saved and restored once more.
        let mut guest = guest.save().resume();
        guest.wait_until("it is resumed", |guest| guest.session.has_started());
        thread::sleep(Duration::from_secs(1));
        guest.session.on_ready(guest.machine.exit_latch()).unwrap();
        let mut input = input(&mut guest);
        input.write_all(b"end\n").unwrap();
        let (end, output) = guest.finish();
        assert_eq!(end, ToHost::Exited(7), "{output}");
        let words: Vec<String> = output.split_whitespace().map(str::to_owned).collect();
        assert_eq!((words.len(), words[0].as_str()), (4, "end"), "{output}");
        let now_s = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(words[3].parse::<u64>().unwrap().abs_diff(now_s) <= 2, "{output}, not {now_s}");
        words[1].clone()
    });
    assert_ne!(answers[0], answers[1], "both drew the same random number");
}

#[test]
fn output_on_its_way_is_printed_once() {
    const LAST: u64 = 200_000;
    let guests = guests!();
    let script = format!("(seq 1 {LAST}; echo done >&2) | cat; exit 3");
    let mut guest = boot(&spec(&script, false, "box"), &kernel_of(&guests));
    let mut output = String::new();
    for round in 0..4 {
        guest.wait_until("it prints", |guest| guest.output().len() > 50_000);
        let saved = guest.save();
        output.push_str(&saved.output);
        guest = saved.resume();
        println!("{} bytes before {round}", saved.output.len());
    }
    let (end, rest) = guest.finish();
    output.push_str(&rest);
    assert_eq!(end, ToHost::Exited(3));
    let expected: String = (1..=LAST).map(|number| format!("{number}\n")).collect();
    let stdout = output.replacen("done\n", "", 1);
    assert!(output.contains("done\n") && stdout == expected, "{} bytes instead of {}", stdout.len(), expected.len());
}

#[test]
fn output_that_was_closed_is_printed_once() {
    const BYTES: usize = 700_000;
    let guests = guests!();
    let script = format!("head -c {BYTES} /dev/zero | tr '\\0' x; exec >&- 2>&-; read x </dev/ttyS0; exit 4");
    // Saved while it prints, and when it has.
    for some in [1, BYTES] {
        let mut guest = boot(&spec(&script, false, "box"), &kernel_of(&guests));
        guest.wait_until("it prints", |guest| guest.output().len() >= some);
        let saved = guest.save();
        let guest = saved.resume();
        thread::sleep(Duration::from_secs(1));
        guest.machine.offer_input(b"\n");
        let (end, rest) = guest.finish();
        assert_eq!((end, saved.output.len() + rest.len()), (ToHost::Exited(4), BYTES));
    }
}

#[test]
fn a_process_that_ends_while_nobody_listens_is_reported() {
    let guests = guests!();
    let mut guest = boot(&spec("echo begun; read x </dev/ttyS0; echo over", true, "box"), &kernel_of(&guests));
    guest.wait_until("it has begun", |guest| guest.output() == "begun\n");
    let saved = guest.save();
    let received = saved.received;
    let late: MakeSession = &|listener, endpoints, timings| {
        // The guest is refused until then.
        let address = listener.local_addr()?.as_pathname().unwrap().to_owned();
        fs::rename(&address, address.with_extension("later"))?;
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(2));
            fs::rename(address.with_extension("later"), address).unwrap();
        });
        resumed(listener, received, endpoints, timings)
    };
    let guest = saved.restore(late);
    guest.machine.offer_input(b"\n");
    assert_eq!(guest.finish(), (ToHost::Exited(0), "over\n".into()));
}

/// What a process finds in its machine. Numbers of processes and pipes depend on how many there were before, and the size of /dev
/// and the limits of processes and signals on the free memory at that time, which the size of the initramfs changes by a page.
const LOOK: &str = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf; pwd; id; env | sort
    mount | sed 's/size=[0-9]*k,nr_inodes=[0-9]*//' | sort
    ls /proc/self/fd; cat /proc/cmdline /sys/class/net/eth0/address; ip addr show lo; ip addr show eth0; ip route; stat -c '%A %u %g %s %n' /* /etc/*
    ulimit -a | grep -v 'pending signals\\|user processes'; cut -d' ' -f 18-20 /proc/self/stat; cd /proc/sys/net
    cat ipv4/ip_unprivileged_port_start ipv4/ping_group_range ipv6/conf/eth0/accept_ra";

fn device(last: u8) -> NetworkConfig {
    let tap = Attachment::Tap { name: "husk-waits".into() };
    NetworkConfig { mac: Some(MacAddress([2, 0, 0, 0, 0, last])), ..NetworkConfig::of(tap) }
}

fn connected(mut spec: GuestSpec, last: u8) -> GuestSpec {
    let addresses = vec![parse_address(&format!("198.18.20.{last}/24")).unwrap()];
    let routes = vec![Route::through("198.18.20.1".parse().unwrap())];
    let setup = InterfaceSetup { addresses, routes, ..device(last).into() };
    spec.connect(NetworkSetup::new(vec![setup], &["192.0.2.53".parse().unwrap()]));
    spec
}

#[test]
fn a_run_finds_in_a_waiting_machine_what_it_finds_in_one_that_boots_for_it() {
    let guests = guests!();
    if !is_lab() {
        eprintln!("SKIPPED: only the lab gets a tap device");
        return;
    }
    image::run(Command::new("/opt/ip").args(["tuntap", "add", "husk-waits", "mode", "tap", "vnet_hdr"]));
    let kernel = kernel_of(&guests);
    let prepared = connected(spec("never run", false, "prepared"), 9);
    let waiting = config(&prepared, &kernel);
    let initramfs = prepared.waiting_initramfs(&[], &kernel, waiting.virtio_bus()).unwrap();
    let mut guest = Guest::boot(&waiting, initramfs, &|listener, _, timings| Session::waiting(listener, timings));
    guest.wait_until("it waits", |guest| guest.session.is_waiting());
    let saved = guest.save();
    for last in [2, 3] {
        let spec = connected(spec(&format!("{LOOK}; exit {last}"), false, &format!("box-{last}")), last);
        let (end, booted) = boot(&spec, &kernel).finish();
        assert_eq!(end, ToHost::Exited(last));
        let (overlay, run) = spec.begin(&waiting.networks).unwrap();
        let start = Instant::now();
        let mut guest = saved.restore_with(&config(&spec, &kernel), &|listener, endpoints, timings| {
            Session::beginning(listener, overlay.clone(), run.clone(), endpoints, timings)
        });
        guest.wait_until("its process has started", |guest| guest.session.has_started());
        println!("started after {} ms", start.elapsed().as_millis());
        let (end, begun) = guest.finish();
        assert_eq!((end, begun), (ToHost::Exited(last), booted));
    }
    image::run(Command::new("/opt/ip").args(["link", "del", "husk-waits"]));
}
