//! Images and backing files that another process truncates while they are in use.

use super::*;

const DATA_BYTES: usize = 4 * MIB as usize;

fn truncate(path: &Path, len_bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(len_bytes).unwrap();
}

/// Whether a read of a sector fails as it should.
fn is_cut_off(disk: &mut Disk, at: u64) -> bool {
    match disk.run(Operation::Read, at, &[(0, 512)]) {
        Ok(()) => false,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            true
        }
    }
}

#[test]
fn what_is_cut_off_is_an_error_until_it_is_written_again() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let mut disk = Disk::new(open(&path, false).unwrap());
    let data = bytes(1, DATA_BYTES);
    disk.write(0, &data);
    disk.run(Operation::Flush, 0, &[]).unwrap();
    truncate(&path, std::fs::metadata(&path).unwrap().len() / 2);
    assert_eq!(disk.read(0, 4096), data[..4096]);
    assert!(disk.read(2 * DATA_BYTES as u64, 4096).iter().all(|byte| *byte == 0), "nothing was ever there");
    let last = DATA_BYTES as u64 - 65536;
    assert!(is_cut_off(&mut disk, last));
    disk.write(last, &data[..65536]);
    assert_eq!(disk.read(last, 65536), data[..65536]);
}

#[test]
fn without_its_tables_every_request_is_an_error() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=512");
    Disk::new(open(&path, false).unwrap()).write(0, &bytes(1, DATA_BYTES));
    let mut disk = Disk::new(open(&path, false).unwrap());
    truncate(&path, 0);
    assert!((0..DATA_BYTES as u64).step_by(64 << 10).all(|at| is_cut_off(&mut disk, at)));
    disk.run(Operation::Write, 0, &[(0, 512)]).unwrap_err();
    disk.run(Operation::Discard { len_bytes: 1 << 20 }, 0, &[]).unwrap_err();
}

#[test]
fn a_truncated_backing_file_is_an_error() {
    let Some(dir) = dir() else { return };
    let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
    std::fs::write(&base, bytes(1, DATA_BYTES)).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), top.to_str().unwrap(), "8M"]);
    let backing = Backing::raw(File::open(&base).unwrap()).unwrap();
    let file = File::options().read(true).write(true).open(&top).unwrap();
    let mut disk = Disk::new(Qcow2Disk::open(file, false, Some(backing)).unwrap());
    truncate(&base, MIB);
    assert_eq!(disk.read(0, 4096), bytes(1, 4096));
    assert!(is_cut_off(&mut disk, MIB));
    assert!(!is_cut_off(&mut disk, DATA_BYTES as u64), "the backing file always ended there");
}
