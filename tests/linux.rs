//! Real Linux guests, booted as a user boots them: stock and purpose-built kernels, disks, buttons and panics.
//!
//! They need a KVM that runs unmodified kernels, and guests: `HUSK_TEST_GUESTS` names a folder with `stock/` and
//! `micro/`, each with `vmlinux`, `bzImage` and `initrd` (scripts/test makes it, and runs this in the lab where the host's
//! KVM will not do). Without it every test says that it was skipped; with it none is.

#[path = "run/uplink.rs"]
mod uplink;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any boot takes, even emulated on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
const GUESTS: &str = "HUSK_TEST_GUESTS";

/// The folder of guests, or `None` and a loud word.
fn guests(test: &str) -> Option<PathBuf> {
    let guests = std::env::var_os(GUESTS).map(PathBuf::from);
    if guests.is_none() {
        eprintln!("SKIPPED {test}: {GUESTS} names no guests; `scripts/test guests` runs this");
    }
    guests
}

/// Begins a test that needs guests.
macro_rules! guests {
    () => {{
        fn here() {}
        let Some(guests) = guests(std::any::type_name_of_val(&here)) else { return };
        guests
    }};
}

/// How a machine ended, and what it said.
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

impl Ended {
    /// The `key=value` lines of the guest's init.
    fn values(&self) -> HashMap<&str, &str> {
        self.output.lines().filter_map(|line| line.trim().split_once('=')).collect()
    }

    #[track_caller]
    fn expect(&self, code: i32, what: &str) -> &Ended {
        assert_eq!(self.code, Some(code), "{what}\n{}\n{}", self.output, self.errors);
        self
    }
}

/// `husk boot` of the guest in `guest`, told to do `job`.
fn husk(guest: &Path, image: &str, job: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    command.arg("boot").arg("--kernel").arg(guest.join(image)).arg("--initrd").arg(guest.join("initrd"));
    command.args(flags).args(["--cmdline", &format!("-- {job}")]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Boots a guest to its end. On an emulated processor a triple fault was seen once in about a hundred boots, of unproven
/// cause: there it is told loudly and the guest is booted once more. On a real one it counts.
fn boot(guest: &Path, image: &str, job: &str, flags: &[&str]) -> Ended {
    const TRIPLE_FAULT: i32 = 82;
    let run = || finish(husk(guest, image, job, flags).spawn().unwrap());
    let ended = run();
    if ended.code != Some(TRIPLE_FAULT) || !is_emulated() {
        return ended;
    }
    eprintln!("RETRIED {job} after: {}", ended.errors);
    run()
}

/// Waits for the end of `child`, and kills it when it does not come.
fn finish(mut child: Child) -> Ended {
    let collect = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = collect(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let errors = collect(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let started = Instant::now();
    let code = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status.code(),
            None if started.elapsed() > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    };
    Ended { code, output: output.join().unwrap(), errors: errors.join().unwrap() }
}

/// Runs a program of the host's and returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A disk image of `bytes`, with an ext4 file system if wanted.
fn disk(folder: &Path, bytes: u64, file_system: bool) -> String {
    let path = folder.join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    let path = path.to_str().unwrap().to_owned();
    if file_system {
        run("mkfs.ext4", &["-q", "-F", &path]);
    }
    path
}

/// Boots of a kernel in one format: at every size of memory, and at every count of vCPUs. The two have nothing to do with
/// each other, so that their product would only be slower.
fn is_emulated() -> bool {
    std::env::var_os("HUSK_TEST_EMULATED").is_some()
}

fn boots_at_every_size(guests: &Path, kernel: &str, image: &str) {
    // Of the stock kernel 46 MiB are the kernel, and it panics for lack of memory when it is given 64.
    let smallest_mib = if kernel == "stock" { 96 } else { 64 };
    let mut sizes = vec![(1, smallest_mib), (2, 6144), (1, 512), (2, 512), (4, 512)];
    // A packed kernel is the same one once it is in memory; where each boot takes seconds, the ends will do for it.
    if image == "bzImage" && is_emulated() {
        sizes.truncate(2);
    }
    for (cpus, memory_mib) in sizes {
        let what = format!("{kernel}/{image}, {cpus} vCPUs, {memory_mib} MiB");
        let flags = ["--cpus", &cpus.to_string(), "--memory", &format!("{memory_mib}M")];
        let ended = boot(&guests.join(kernel), image, "report", &flags);
        let values = ended.expect(0, &what).values();
        assert_eq!(values["cpus"], cpus.to_string(), "{what}");
        let seen_mib = values["memory_kib"].parse::<u64>().unwrap() / 1024;
        // The kernel keeps its own text, data and page structures out of the count.
        let least_mib = memory_mib - memory_mib / 20 - 40;
        assert!((least_mib..=memory_mib).contains(&seen_mib), "{what}: the guest sees {seen_mib} MiB");
        let apic_ids: Vec<String> = (0..cpus).map(|id| id.to_string()).collect();
        assert_eq!(values["apic_ids"], apic_ids.join(","), "{what}");
        assert_eq!(values["siblings"], "0", "{what}: one thread a core");
        let package = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
        assert_eq!(values["package"], package, "{what}: all cores in one package");
        assert_eq!(values["clock"], "kvm-clock", "{what}");
        assert_eq!(values["random"], "64", "{what}: random bytes from the host");
    }
}

#[test]
fn a_stock_vmlinux_boots_at_every_size() {
    boots_at_every_size(&guests!(), "stock", "vmlinux");
}

#[test]
fn a_stock_bzimage_boots_at_every_size() {
    boots_at_every_size(&guests!(), "stock", "bzImage");
}

#[test]
fn a_micro_vmlinux_boots_at_every_size() {
    boots_at_every_size(&guests!(), "micro", "vmlinux");
}

#[test]
fn a_micro_bzimage_boots_at_every_size() {
    boots_at_every_size(&guests!(), "micro", "bzImage");
}

/// Finds what a guest wrote in the raw disk `image` whole and in order.
fn holds_what_was_written(image: &str, ended: &Ended, what: &str) {
    assert_eq!(ended.expect(0, what).values()["unmounted"], "yes");
    run("e2fsck", &["-f", "-n", image]);
    let data = format!("{image}.data");
    run("debugfs", &["-R", &format!("dump /data {data}"), image]);
    assert_eq!(fs::metadata(&data).unwrap().len(), 16 << 20);
    let sha256 = run("sha256sum", &[&data]);
    assert_eq!(sha256.split_whitespace().next(), Some(ended.values()["sha256"]), "{what}");
}

#[test]
fn what_a_guest_syncs_is_on_the_disk() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let folder = tempfile::tempdir().unwrap();
        let image = disk(folder.path(), 64 << 20, true);
        let ended = boot(&guests.join(kernel), "vmlinux", "write", &["--disk", &image, "--cpus", "2"]);
        holds_what_was_written(&image, &ended, kernel);
    }
}

#[test]
fn what_a_guest_syncs_is_in_the_qcow2_image() {
    let guests = guests!();
    let folder = tempfile::tempdir().unwrap();
    let raw = disk(folder.path(), 64 << 20, true);
    let image = raw.replace(".img", ".qcow2");
    // Compressed, so that what is there has to be unpacked, and moved to be written to.
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]);
    let ended = boot(&guests.join("micro"), "vmlinux", "write", &["--disk", &image, "--cpus", "2"]);
    run("qemu-img", &["check", "-q", &image]);
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &image, &raw]);
    holds_what_was_written(&raw, &ended, "qcow2");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let guests = guests!();
    let folder = tempfile::tempdir().unwrap();
    let image = disk(folder.path(), 32 << 20, true);
    let before = fs::read(&image).unwrap();
    let ended = boot(&guests.join("micro"), "vmlinux", "read_only", &["--disk", &format!("{image},ro")]);
    let values = ended.expect(0, "read-only disk").values();
    assert_eq!((values["ro"], values["mounted"], values["written"]), ("1", "yes", "no"));
    assert!(fs::read(&image).unwrap() == before, "the image changed");
}

#[test]
fn a_disk_goes_on_beyond_two_tebibytes() {
    const MIB: u64 = 1 << 20;
    const SIZE_MIB: u64 = 3 << 20;
    let guests = guests!();
    let folder = tempfile::tempdir().unwrap();
    let image = disk(folder.path(), MIB, false);
    // Grown as a user grows one: sparse, after it was made.
    File::options().write(true).open(&image).unwrap().set_len(SIZE_MIB * MIB).unwrap();
    let at_mib = SIZE_MIB - 1;
    let ended = boot(&guests.join("micro"), "vmlinux", &format!("far {at_mib}"), &["--disk", &image]);
    let values = ended.expect(0, "disk of 3 TiB").values();
    assert_eq!((values["bytes"], values["found"]), (&*(SIZE_MIB * MIB).to_string(), "far away"));
    let mut file = File::open(&image).unwrap();
    let mut found = [0; 8];
    file.seek(SeekFrom::Start(at_mib * MIB)).unwrap();
    file.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"far away");
}

#[test]
fn a_reboot_ends_with_its_own_code() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", "reboot", &[]);
        ended.expect(80, kernel);
        assert!(ended.errors.contains("husk: the guest reset itself"), "{}", ended.errors);
    }
}

#[test]
fn a_panic_is_told_in_the_kernels_words_and_ends_passt_too() {
    let guests = guests!();
    let port = TcpListener::bind(("0.0.0.0", 0)).unwrap().local_addr().unwrap().port();
    let published = format!("{port}:80");
    let flags = if uplink::host().is_some() { &["-p", &published][..] } else { &[] };
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", "panic", flags);
        ended.expect(81, kernel);
        let told = "husk: the guest's kernel panicked: Attempted to kill init!";
        assert!(ended.errors.contains(told), "{kernel}: {}", ended.errors);
        assert!(TcpListener::bind(("0.0.0.0", port)).is_ok(), "passt has the port still");
    }
}

#[test]
fn a_guest_reports_its_own_exit_code() {
    boot(&guests!().join("micro"), "vmlinux", "exit", &[]).expect(42, "exit port");
}

#[test]
fn timings_tell_of_every_step() {
    let ended = boot(&guests!().join("micro"), "vmlinux", "mark", &["--timings"]);
    ended.expect(0, "timings");
    let at = |step: &str| {
        let line = ended.errors.lines().find(|line| line.starts_with(step)).unwrap_or_else(|| panic!("no {step}"));
        line[step.len()..].split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    let steps = ["KVM ready", "kernel loaded", "first guest instruction", "first kernel output", "PID 1", "exit"];
    let times: Vec<f64> = steps.iter().map(|step| at(step)).collect();
    // `quiet` may hold back the kernel's output beyond PID 1's start; all else is in order.
    let ordered = [times[0], times[1], times[2], times[4], times[5]];
    assert!(ordered.is_sorted() && times[0] > 0.0, "{}", ended.errors);
}

const PIECE_BYTES: usize = 64 << 10;
const MIB: usize = 1 << 20;

/// Piece `index` of what is sent through a socket, as firmware/guests/linux/vsock.c makes it.
fn piece(index: usize) -> Vec<u8> {
    let word = |at: u64| if at == 0 { index as u64 } else { at.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
    (0..PIECE_BYTES as u64).step_by(8).flat_map(|at| word(at).to_le_bytes()).collect()
}

fn send_pieces(mut stream: UnixStream, len: usize) {
    for index in 0..len / PIECE_BYTES {
        stream.write_all(&piece(index)).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// A program of the host's that sends back what it gets, on as many connections as come.
fn serve_echo(listener: UnixListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || {
            std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
    }
}

/// Connects to `port` of the guest's. `None` where the guest refuses.
fn call(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        answer.extend(byte);
        if byte == *b"\n" {
            assert!(answer.starts_with(b"OK "), "{answer:?}");
            return Some(stream);
        }
    }
    None
}

/// What the host asks of a guest that serves its ports 1000 (it sends back what it gets) and 1001 (it takes all and then says
/// how much it was).
fn talk_to_guest(socket: &Path) {
    let mut echo = call(socket, 1000).unwrap();
    let sender = echo.try_clone().unwrap();
    let sending = thread::spawn(move || send_pieces(sender, 64 * MIB));
    let mut got = vec![0; PIECE_BYTES];
    for index in 0..64 * MIB / PIECE_BYTES {
        echo.read_exact(&mut got).unwrap();
        assert!(got == piece(index), "piece {index} came back otherwise");
    }
    assert_eq!(echo.read(&mut got).unwrap(), 0);
    sending.join().unwrap();

    let mut half = call(socket, 1001).unwrap();
    send_pieces(half.try_clone().unwrap(), MIB);
    let mut total = String::new();
    half.read_to_string(&mut total).unwrap();
    assert_eq!(total.trim(), MIB.to_string());

    let mut many: Vec<_> = (0..50).map(|number| (call(socket, 1000).unwrap(), number)).collect();
    for (stream, number) in &mut many {
        stream.write_all(&[*number; 3000]).unwrap();
    }
    for (mut stream, number) in many.into_iter().rev() {
        let mut got = [0xff; 3000];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(got, [number; 3000]);
    }
    assert!(call(socket, 9).is_none(), "nobody serves this port");
}

#[test]
fn guest_and_host_talk_through_sockets() {
    let guests = guests!();
    for kernel in ["micro", "stock"] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("v.sock");
        let listener = UnixListener::bind(folder.path().join("v.sock_52")).unwrap();
        thread::spawn(move || serve_echo(listener));
        let flags = ["--vsock", socket.to_str().unwrap()];
        let (child, output) = start_and_wait(&mut husk(&guests.join(kernel), "vmlinux", "sockets", &flags), "serving=");
        talk_to_guest(&socket);
        drop(call(&socket, 1002));
        finish(child).expect(0, kernel);
        let output: Vec<String> = output.try_iter().collect();
        let said = |line: &str| assert!(output.iter().any(|said| said.trim() == line), "{kernel}: {line}: {output:?}");
        said(&format!("received={}", 64 * MIB));
        said("echoed=50");
        said("refused=ECONNRESET");
        assert!(!socket.exists(), "{kernel}: the socket goes with its machine");
    }
}

#[test]
fn a_guest_gets_its_address_by_dhcp_and_reaches_the_host() {
    let guests = guests!();
    let Some(host) = uplink::host() else { return };
    let listener = TcpListener::bind((host, 0)).unwrap();
    let job = format!("network {host} {}", listener.local_addr().unwrap().port());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"the host\n");
        }
    });
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", &job, &["--network", "user,mac=02:00:00:00:00:77"]);
        let values = ended.values();
        assert_eq!(values.get("dhcp"), Some(&"10.0.2.15/24 10.0.2.2 65520"), "{kernel}: {}", ended.output);
        assert_eq!(values.get("heard"), Some(&"the host"), "{kernel}: {}", ended.output);
    }
}

/// Starts a guest and waits until its init says `word`. Returns it and the lines that it prints.
fn start_and_wait(command: &mut Command, word: &str) -> (Child, mpsc::Receiver<String>) {
    let mut child = command.spawn().unwrap();
    let (said, heard) = mpsc::channel();
    let (line_said, lines) = mpsc::channel();
    let (stdout, word) = (child.stdout.take().unwrap(), word.to_owned());
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let found = line.contains(&word);
            let _ = line_said.send(line);
            if found {
                let _ = said.send(());
            }
        }
    });
    if heard.recv_timeout(PATIENCE).is_err() {
        child.kill().unwrap();
        panic!("the guest did not come up: {:?} {:?}", lines.try_iter().collect::<Vec<_>>(), finish(child).errors);
    }
    (child, lines)
}

fn signal(child: &Child, name: &str) {
    run("kill", &[&format!("-{name}"), &child.id().to_string()]);
}

#[test]
fn sigterm_presses_the_power_button() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let (child, _) = start_and_wait(&mut husk(&guests.join(kernel), "vmlinux", "button", &[]), "waiting=event");
        // The guest opens the device just after it says so.
        thread::sleep(Duration::from_millis(500));
        signal(&child, "TERM");
        finish(child).expect(0, kernel);
    }
}

#[test]
fn kill_9_leaves_nothing_behind() {
    let guests = guests!();
    let folder = tempfile::tempdir().unwrap();
    let image = disk(folder.path(), 32 << 20, true);
    let guest = guests.join("micro");
    let flags = ["--disk", &*image];
    let (mut child, _) = start_and_wait(&mut husk(&guest, "vmlinux", "hold", &flags), "holding=yes");
    boot(&guest, "vmlinux", "report", &flags).expect(1, "a disk in use is refused");
    child.kill().unwrap();
    child.wait().unwrap();
    let ended = boot(&guest, "vmlinux", "write", &flags);
    assert_eq!(ended.expect(0, "the disk is free again").values()["unmounted"], "yes");
    let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["disk.img"]);
}

#[test]
fn piped_commands_reach_a_shell() {
    let mut command = husk(&guests!().join("micro"), "vmlinux", "shell", &[]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo sum=$((40 + 2)); uname -s\npoweroff -f\n").unwrap();
    let ended = finish(child);
    ended.expect(0, "shell");
    assert!(ended.output.contains("sum=42") && ended.output.contains("Linux"), "{}", ended.output);
}

#[test]
fn a_shell_of_the_demo_ends_the_machine_by_poweroff_and_by_the_power_button() {
    let guest = guests!().join("micro");
    let start = || {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.arg("boot").arg("--kernel").arg(guest.join("vmlinux")).arg("--initrd").arg(guest.join("demo"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Stays open until the machine has ended: the end of the input would end it too.
        let input = child.stdin.take().unwrap();
        (child, input)
    };
    let (child, mut input) = start();
    input.write_all(b"poweroff\n").unwrap();
    finish(child).expect(0, "poweroff");

    let (mut child, mut input) = start();
    input.write_all(b"echo up=$((1 + 1))\n").unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("up=2") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the guest ended");
    }
    signal(&child, "TERM");
    finish(child).expect(0, "power button");
}

#[test]
fn many_boots_in_a_row_all_end() {
    let guest = guests!().join("micro");
    let boots = if is_emulated() { 8 } else { 20 };
    for n in 1..=boots {
        boot(&guest, "vmlinux", "none", &["--cpus", "2"]).expect(0, &format!("boot {n} of {boots}"));
    }
}
