//! The guest's view of its machine: ports, memory, processors, time, and the ways to end it.

use crate::husk::boot;
use husk_guests as guests;

/// husk's exit codes, as listed by `husk boot --help`.
const RESET: i32 = 80;
const PANICKED: i32 = 81;
const TRIPLE_FAULT: i32 = 82;
const KVM_ERROR: i32 = 83;

#[test]
fn the_guests_exit_code_is_husks() {
    needs_kvm!();
    boot(guests::EXIT, "").run().expect(42);
    for code in [0, 1, 7, 255] {
        let ran = boot(guests::POWER, &format!("do=exit code={code}")).run();
        assert_eq!(ran.expect(code), "");
    }
}

#[test]
fn power_off_exits_with_0_silently() {
    needs_kvm!();
    let ran = boot(guests::POWER, "do=poweroff").run();
    assert_eq!(ran.expect(0), "ready\n");
    assert_eq!(ran.stderr, "");
}

#[test]
fn a_reset_is_reported_for_each_port() {
    needs_kvm!();
    for way in ["reset", "keyboard-reset"] {
        let ran = boot(guests::POWER, &format!("do={way}")).run();
        assert!(ran.expect_line(RESET).contains("reset"), "{}", ran.stderr);
    }
}

#[test]
fn a_panic_is_reported() {
    needs_kvm!();
    let ran = boot(guests::POWER, "do=panic").run();
    assert!(ran.expect_line(PANICKED).contains("panic"), "{}", ran.stderr);
}

#[test]
fn a_triple_fault_is_reported_with_its_address_if_available() {
    needs_kvm!();
    let ran = boot(guests::POWER, "do=triple-fault").run();
    let line = ran.expect_line(TRIPLE_FAULT);
    // The guest is at 2 MiB; AMD's processors lose the address.
    assert!(line.ends_with("triple fault on vCPU 0") || line.contains("triple fault on vCPU 0 at 0x2"), "{line}");
}

#[test]
fn a_kvm_error_is_reported_with_its_address() {
    needs_kvm!();
    let ran = boot(guests::POWER, "do=wild-jump").run();
    let line = ran.expect_line(KVM_ERROR);
    assert!(line.contains("vCPU 0") && line.contains("0xd8000000"), "{line}");
}

#[test]
fn ports_of_every_width_answer_and_holes_read_all_ones() {
    needs_kvm!();
    assert_eq!(boot(guests::IO, "do=ports").run().expect(0), "written by a string instruction\ndone\n");
}

#[test]
fn memory_holes_of_every_width_read_all_ones() {
    needs_kvm!();
    boot(guests::IO, "do=holes").run().expect(0);
}

#[test]
fn device_registers_handle_every_width_offset_and_value() {
    needs_kvm!();
    boot(guests::IO, "do=registers").run().expect(0);
}

#[test]
fn the_guest_sees_the_memory_that_was_asked_for() {
    needs_kvm!();
    // Excluding the area reserved for a BIOS below 1 MiB: 0x9fc00 to 0x100000.
    const KEPT_KIB: u64 = (0x10_0000 - 0x9_fc00) >> 10;
    for (memory, mib, end) in [
        ("32M", 32, 0x200_0000_u64),
        ("512M", 512, 0x2000_0000),
        ("3G", 3072, 0xc000_0000),
        ("3073M", 3073, 0x1_0010_0000),
        ("6G", 6144, 0x1_c000_0000),
    ] {
        let text = boot(guests::MEMORY, "").flag("--memory", memory).run().expect(0);
        let expected = format!("memory {} KiB, end {end:x}", mib * 1024 - KEPT_KIB);
        assert_eq!(text.lines().last(), Some(&*expected), "{text}");
    }
}

#[test]
fn every_processor_starts_and_knows_its_number() {
    needs_kvm!();
    for cpus in [1, 2, 4] {
        let text = boot(guests::PROCESSORS, &format!("cpus={cpus}")).flag("--cpus", cpus.to_string()).run().expect(0);
        let counted = (1..cpus).map(|cpu| format!("processor {cpu} counted\n")).collect::<String>();
        assert_eq!(text, format!("first processor 0\n{counted}logical processors {cpus}\n"));
    }
}

#[test]
fn clocks_run_and_timers_fire() {
    needs_kvm!();
    boot(guests::CLOCK, "do=kvm-clock").run().expect(0);
    boot(guests::CLOCK, "do=apic-timer").run().expect(0);
    boot(guests::CLOCK, "do=deadline-timer").run().expect(0);
}

#[test]
fn random_bytes_differ_and_a_request_for_too_many_is_answered_in_part() {
    needs_kvm!();
    boot(guests::ENTROPY, "do=read").run().expect(0);
    let text = boot(guests::ENTROPY, "do=large").run().expect(0);
    let given: u64 = text.lines().find_map(|line| line.strip_prefix("given ")).unwrap().parse().unwrap();
    assert!((1..=1 << 20).contains(&given));
}

#[test]
fn no_interrupt_of_a_device_is_lost() {
    needs_kvm!();
    let text = boot(guests::ENTROPY, "do=interrupt count=1000").run().expect(0);
    assert!(text.contains("interrupts 1000\n"), "{text}");
}

#[test]
fn timings_agree_with_a_stopwatch() {
    needs_kvm!();
    let mut command = boot(guests::POWER, "do=mark").command();
    command.arg("--timings");
    let started = std::time::Instant::now();
    let output = command.output().unwrap();
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let mut last = -1.0;
    for step in [
        "process start",
        "KVM ready",
        "kernel loaded",
        "first guest instruction",
        "first kernel output",
        "PID 1",
        "exit",
    ] {
        let line = stderr.lines().find(|line| line.starts_with(step)).unwrap_or_else(|| panic!("no {step}: {stderr}"));
        let at: f64 = line[step.len()..].split_whitespace().next().unwrap().parse().unwrap();
        // KVM is set up and the kernel loaded at the same time.
        let earliest = if step == "kernel loaded" { 0.0 } else { last };
        assert!(at >= earliest && at <= took_ms, "{step} at {at} of {took_ms} ms\n{stderr}");
        last = at.max(last);
    }
}
