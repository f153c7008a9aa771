//! Tests of every back end for raw images, through [`on_every_backend`].

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{self, GuestMemory};
use crate::sys;

/// Calls `test` with each back end for `file`.
fn on_every_backend(file: &File, test: impl Fn(&mut dyn DiskBackend)) {
    let plain = || PlainDisk::new(file.try_clone().unwrap(), false);
    test(&mut Blocking::new(plain()));
    for shortcuts in [Shortcuts::Allowed, Shortcuts::Never] {
        test(&mut UringDisk::new(plain(), shortcuts).unwrap());
    }
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(memory::reserve(4).unwrap())
}

fn image(len_bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len_bytes).unwrap();
    file
}

fn buffers(memory: &Arc<GuestMemory>, parts: &[(u64, u32)]) -> GuestBuffers {
    let mut buffers = GuestBuffers::new(memory.clone());
    parts.iter().for_each(|(at, len)| buffers.push(GuestAddress(*at), *len).unwrap());
    buffers
}

/// Executes one request.
fn run(disk: &mut dyn DiskBackend, operation: Operation, offset_bytes: u64, buffers: GuestBuffers) -> io::Result<()> {
    disk.submit(Request { token: 7, operation, offset_bytes, buffers });
    disk.drain();
    let completion = disk.reap().unwrap();
    assert_eq!((completion.request.token, disk.reap().is_none()), (7, true));
    completion.result
}

#[test]
fn a_batch_is_completed_once_each_in_the_right_place() {
    // More than a ring holds, from one part to more than one call accepts.
    const REQUESTS: usize = 300;
    let part_count = |token: usize| if token == 9 { 1500 } else { token as u64 % 3 + 1 };
    let at = |token: usize| (token as u64 + if token > 9 { 6 } else { 0 }) * 512;
    let file = image(1 << 20);
    on_every_backend(&file, |disk| {
        let memory = memory();
        for operation in [Operation::Write, Operation::Read] {
            let base = if operation == Operation::Write { 0 } else { 2 << 20 };
            for token in 0..REQUESTS {
                let parts: Vec<_> = (0..part_count(token)).map(|part| (base + at(token) + 2 * part, 2)).collect();
                for (address, _) in &parts {
                    let value = if base == 0 { (address ^ token as u64) as u16 | 1 } else { 0 };
                    memory.write_obj(value, GuestAddress(*address)).unwrap();
                }
                let buffers = buffers(&memory, &parts);
                disk.submit(Request { token, operation, offset_bytes: at(token), buffers });
            }
            disk.kick();
            disk.drain();
            let mut done: Vec<_> =
                std::iter::from_fn(|| disk.reap()).map(|c| (c.request.token, c.result.is_ok())).collect();
            done.sort_unstable();
            assert_eq!(done, (0..REQUESTS).map(|token| (token, true)).collect::<Vec<_>>());
        }
        let bytes = |base| {
            let mut bytes = vec![0; 1 << 20];
            memory.read_slice(&mut bytes, GuestAddress(base)).unwrap();
            bytes
        };
        assert!(bytes(0) == bytes(2 << 20) && bytes(0).iter().any(|byte| *byte != 0));
    });
}

#[test]
fn a_truncated_image_is_an_error_and_nothing_else() {
    let (file, memory) = (image(4096), memory());
    file.write_all_at(&[0x11; 4096], 0).unwrap();
    on_every_backend(&file, |disk| {
        file.set_len(512).unwrap();
        let error = run(disk, Operation::Read, 0, buffers(&memory, &[(0, 1024)])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = run(disk, Operation::Read, 2048, buffers(&memory, &[(0, 512), (1024, 512)])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        run(disk, Operation::Read, 0, buffers(&memory, &[(0, 512)])).unwrap();
        // A write extends it again.
        run(disk, Operation::Write, 2048, buffers(&memory, &[(0, 512)])).unwrap();
        run(disk, Operation::Read, 0, buffers(&memory, &[(0, 1024)])).unwrap();
    });
}

#[test]
fn a_full_disk_is_an_error_and_the_next_request_succeeds() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let memory = memory();
    on_every_backend(&full, |disk| {
        for _ in 0..2 {
            for parts in [&[(0, 512)][..], &[(0, 512), (1024, 512)]] {
                let error = run(disk, Operation::Write, 0, buffers(&memory, parts)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            }
            run(disk, Operation::Read, 0, buffers(&memory, &[(0, 512)])).unwrap();
        }
    });
}

#[test]
fn a_flush_reaches_the_disk() {
    let nothing = || GuestBuffers::new(memory());
    on_every_backend(&image(512), |disk| run(disk, Operation::Flush, 0, nothing()).unwrap());
    // The null device rejects fsync: without an error, it was not called.
    let null = File::options().write(true).open("/dev/null").unwrap();
    on_every_backend(&null, |disk| {
        let error = run(disk, Operation::Flush, 0, nothing()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
fn zeroed_and_discarded_ranges_are_the_ones_asked_for() {
    let nothing = || GuestBuffers::new(memory());
    let file = image(1 << 20);
    let contents = |offset_bytes, len| {
        let mut bytes = vec![0xee; len];
        file.read_exact_at(&mut bytes, offset_bytes).unwrap();
        bytes
    };
    on_every_backend(&file, |disk| {
        for unmap in [true, false] {
            file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
            let len_bytes = 100 << 10;
            run(disk, Operation::WriteZeroes { len_bytes, unmap }, 512, nothing()).unwrap();
            assert_eq!(contents(0, 513)[511..], [0xaa, 0]);
            assert_eq!(contents(512 + len_bytes - 1, 2), [0, 0xaa]);
            assert!(contents(512, 100 << 10).iter().all(|byte| *byte == 0));
            run(disk, Operation::WriteZeroes { len_bytes: 0, unmap }, 0, nothing()).unwrap();
            assert_eq!((contents(0, 1), file.metadata().unwrap().len()), (vec![0xaa], 1 << 20));
        }
        file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
        file.sync_data().unwrap();
        let before = file.metadata().unwrap().blocks();
        run(disk, Operation::Discard { len_bytes: 512 << 10 }, 0, nothing()).unwrap();
        run(disk, Operation::Discard { len_bytes: 0 }, 0, nothing()).unwrap();
        let freed = before - file.metadata().unwrap().blocks();
        assert!(freed >= 1024, "{freed} blocks of 512 bytes were freed");
        assert_eq!(contents(512 << 10, 1), [0xaa]);
    });
}

#[test]
fn a_host_without_support_writes_zeroes_and_ignores_discards() {
    let nothing = || GuestBuffers::new(memory());
    // tmpfs punches holes but does not zero.
    let file = sys::memory_file(c"disk").unwrap();
    on_every_backend(&file, |disk| {
        file.write_all_at(&[0xaa; 256 << 10], 0).unwrap();
        run(disk, Operation::WriteZeroes { len_bytes: 100 << 10, unmap: false }, 512, nothing()).unwrap();
        let mut bytes = [0xee; 256 << 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        assert_eq!((zeroes, bytes[511], bytes[512 + (100 << 10)]), (100 << 10, 0xaa, 0xaa));
    });
    // Not really a block device.
    let plain = PlainDisk::new(file, true);
    let mut disks: [Box<dyn DiskBackend>; 2] =
        [Box::new(Blocking::new(plain.clone())), Box::new(UringDisk::new(plain, Shortcuts::Never).unwrap())];
    for disk in &mut disks {
        run(&mut **disk, Operation::Discard { len_bytes: 512 }, 0, nothing()).unwrap();
    }
}

/// Whatever its buffers are like, a request on a disk without a cache succeeds, and is not cached.
#[test]
fn a_direct_disk_accepts_any_buffers() {
    let file = image(4 << 20);
    let cached = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    if let Err(error) = rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::DIRECT) {
        return eprintln!("SKIPPED: temporary files cannot be accessed directly here: {error}");
    }
    let alignment = Alignment { memory_bytes: 4096, offset_bytes: 4096 };
    let plain = PlainDisk::direct(file, false, alignment);
    let mut disks: [Box<dyn DiskBackend>; 3] = [
        Box::new(Blocking::new(plain.clone())),
        Box::new(UringDisk::new(plain.clone(), Shortcuts::Allowed).unwrap()),
        // Claims that anything is accepted, which is corrected by the kernel's error.
        Box::new(
            UringDisk::new(
                PlainDisk::direct(
                    plain.file().try_clone().unwrap(),
                    false,
                    Alignment { memory_bytes: 1, offset_bytes: 1 },
                ),
                Shortcuts::Never,
            )
            .unwrap(),
        ),
    ];
    let whole = BOUNCE_BYTES as u32 * 2 + 4096;
    let shapes: [&[(u64, u32)]; 4] =
        [&[(0, 8192)], &[(1, 4096)], &[(512, 1024), (0x2000, 7168), (0x9001, 4096)], &[(3, 1), (77, whole - 1)]];
    // A look makes the host read ahead, which may be done before it returns, so that one in many may find something.
    let mut is_cached = |at: &u64| {
        let memory = memory();
        run(&mut *disks[0], Operation::Write, *at, buffers(&memory, &[(0, 8192)])).unwrap();
        sys::disk::read_at_now(&cached, &mut buffers(&memory, &[(0, 4096)]), *at).is_ok()
    };
    let places = (0..16).map(|place| place << 18);
    assert!(places.filter(&mut is_cached).count() < 16, "what is written is in the page cache");
    for (round, disk) in disks.iter_mut().enumerate() {
        for (index, shape) in shapes.iter().enumerate() {
            let (memory, at) = (memory(), 4096 * (1 + 3 * index as u64));
            let wanted: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 7) as u8 ^ round as u8).collect();
            memory.write_slice(&wanted, GuestAddress(0)).unwrap();
            run(&mut **disk, Operation::Write, at, buffers(&memory, shape)).unwrap();
            memory.write_slice(&vec![0; 4 << 20], GuestAddress(0)).unwrap();
            run(&mut **disk, Operation::Read, at, buffers(&memory, shape)).unwrap();
            for (address, len) in *shape {
                let mut bytes = vec![0; *len as usize];
                memory.read_slice(&mut bytes, GuestAddress(*address)).unwrap();
                assert!(bytes == wanted[*address as usize..][..*len as usize], "{round}, {shape:?}");
            }
        }
        run(&mut **disk, Operation::WriteZeroes { len_bytes: 8192, unmap: true }, 4096, GuestBuffers::new(memory()))
            .unwrap();
        run(&mut **disk, Operation::Flush, 0, GuestBuffers::new(memory())).unwrap();
    }
}
