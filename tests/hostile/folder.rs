//! A guest that speaks FUSE by itself: it reaches nothing outside its folder, and keeps nothing of the host's.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arena::{DISK_BYTES, machine, rounds, survives};
use crate::husk::disk_image;
use husk_guests as guests;

/// Lets the guest do its worst to a folder. Returns what it has printed.
#[track_caller]
fn folder(words: &str, transport: &str, dir: &Path) -> String {
    let (temporary, _) = disk_image(DISK_BYTES);
    let share = format!("{}:work", dir.display());
    survives(machine(guests::FOLDER, words, transport, temporary.path()).flag("--share", share)).text()
}

#[test]
fn no_request_reaches_anything_outside_the_folder() {
    needs_kvm!();
    for transport in ["mmio", "pci"] {
        let dir = tempfile::tempdir().unwrap();
        let [work, outside, aside] = ["work", "outside", "aside"].map(|name| dir.path().join(name));
        [&work, &outside, &aside].iter().for_each(|path| fs::create_dir(path).unwrap());
        fs::write(outside.join("secret"), "SECRET!!".repeat(8)).unwrap();
        fs::write(aside.join("secret"), "inside..".repeat(8)).unwrap();
        symlink(outside.join("secret"), work.join("link")).unwrap();
        let look = |path: &Path| {
            let found = fs::symlink_metadata(path).unwrap();
            (found.mode(), found.uid(), found.size(), found.ctime(), found.ctime_nsec())
        };
        let all = || [&outside, &outside.join("secret")].map(|path| look(path));
        let (before, is_done) = (all(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            // The guest may have changed what is there, so each step may fail; none follows a link.
            scope.spawn(|| {
                let (place, held) = (work.join("d"), dir.path().join("held"));
                let _ = fs::rename(&aside, &place);
                while !is_done.load(Ordering::Relaxed) {
                    let _ = fs::rename(&place, &held);
                    let _ = symlink(&outside, &place);
                    let _ = fs::remove_file(&place);
                    let _ = fs::rename(&held, &place);
                }
            });
            let words = format!("do=garbage {}", rounds(100));
            let ended = std::panic::catch_unwind(|| folder(&words, transport, &work));
            is_done.store(true, Ordering::Relaxed);
            let text = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert!(text.contains("walks ") && !text.contains("successes 0\n"), "{text}");
            println!("{text}");
        });
        assert_eq!(all(), before);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != "held").count(),
            2
        );
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "SECRET!!".repeat(8));
    }
}

#[test]
fn files_without_end_are_closed_when_the_guest_starts_anew() {
    needs_kvm!();
    let dir = tempfile::tempdir().unwrap();
    let text = folder(&format!("do=flood {}", rounds(3000)), "mmio", dir.path());
    let made = fs::read_dir(dir.path()).unwrap().count();
    assert!(text.lines().any(|line| line == format!("files {made}")), "{made}: {text}");
}
