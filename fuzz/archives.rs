//! Tar archives with everything that a layer may contain, as seeds of `image_layer`, which corrects their checksums.

/// Archives of zeroes, of which the reader sees none but their end, in each compression.
const COMPRESSED: &[(&str, &[u8])] = &[
    (
        "gzip",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\x63\x60\x18\x05\xa3\x60\x14\x8c\x54\x00\x00\x2e\xaf\xb5\xef\x00\x04\x00\x00",
    ),
    (
        "xz",
        b"\xfd\x37\x7a\x58\x5a\x00\x00\x00\xff\x12\xd9\x41\x02\x00\x21\x01\x1c\x00\x00\x00\x10\xcf\x58\xcc\xe0\x03\xff\x00\x0b\
        \x5d\x00\x00\x6f\xfd\xff\xff\xa3\xb7\x7f\x46\x32\x00\x00\x00\x00\x01\x1f\x80\x08\x00\x00\x00\xee\xfc\x87\x45\xa8\x00\
        \x0a\xfc\x02\x00\x00\x00\x00\x00\x59\x5a",
    ),
    (
        "bzip2",
        b"\x42\x5a\x68\x39\x31\x41\x59\x26\x53\x59\x74\xf5\xad\xf7\x00\x00\x04\x40\x00\xc0\x00\x00\x08\x20\x00\x30\x80\x2a\x69\
        \x45\xac\x38\xbb\x92\x29\xc2\x84\x83\xa7\xad\x6f\xb8",
    ),
    // Two frames, with one to be skipped in between.
    (
        "zstd",
        b"\x28\xb5\x2f\xfd\x60\x00\x03\x45\x00\x00\x08\x00\x01\x00\xfc\x2b\x20\x04\x5a\x2a\x4d\x18\x02\x00\x00\x00no\x28\xb5\x2f\
        \xfd\x60\x00\x03\x45\x00\x00\x08\x00\x01\x00\xfc\x2b\x20\x04",
    ),
    // Not supported.
    ("lz4", b"\x02\x21\x4c\x18\x00\x00\x00\x00"),
];

/// A layer, by its name, and the number of records of its lower part.
pub type Seed = (&'static str, Vec<u8>, usize);

/// All seeds.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = vec![kinds(), names(), attributes(), whiteouts(), sparse(), large()];
    seeds.extend(COMPRESSED.iter().map(|(name, bytes)| (*name, bytes.to_vec(), 0)));
    seeds.extend(faults().into_iter().map(|(name, bytes)| (name, bytes, 0)));
    seeds
}

/// A header with these fields, each at an offset, and content padded to records.
fn entry(kind: u8, name: &[u8], content: &[u8], fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    let size = format!("{:011o}", content.len());
    let usual: [(usize, &[u8]); 8] = [
        (0, name),
        (100, b"0000644"),
        (108, b"0001750"),
        (116, b"0001750"),
        (124, size.as_bytes()),
        (136, b"14000000000"),
        (156, &[kind]),
        (257, b"ustar\x0000"),
    ];
    for (at, field) in usual.iter().chain(fields) {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    entry(b'0', name.as_bytes(), content, &[])
}

fn dir(name: &str) -> Vec<u8> {
    entry(b'5', name.as_bytes(), &[], &[(100, b"0000755")])
}

fn link(kind: u8, name: &str, target: &str) -> Vec<u8> {
    entry(kind, name.as_bytes(), &[], &[(157, target.as_bytes())])
}

/// An extended header.
fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let record = |(keyword, value): &(&str, &str)| {
        let rest = format!(" {keyword}={value}\n");
        let len = (rest.len()..).find(|len| len.to_string().len() + rest.len() == *len).expect("there is one");
        format!("{len}{rest}")
    };
    entry(b'x', b"pax", records.iter().map(record).collect::<String>().as_bytes(), &[])
}

fn kinds() -> Seed {
    let device: &[(usize, &[u8])] = &[(329, b"0000010"), (337, b"0000003")];
    let noise: Vec<u8> = (0..9000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let parts = [
        dir("a"),
        file("a/f", b"short"),
        file("a/big", &noise),
        file("a/even", &noise[..8192]),
        file("a/zeroes", &[0; 20_000]),
        entry(0, b"a/old", b"old", &[]),
        entry(0, b"a/olddir/", &[], &[]),
        entry(b'7', b"a/contiguous", b"c", &[]),
        entry(b'D', b"a/dump", b"names", &[]),
        link(b'1', "a/same", "a/f"),
        link(b'2', "a/link", "f"),
        link(b'2', "a/long-link", &"t".repeat(99)),
        entry(b'3', b"a/char", &[], device),
        entry(b'4', b"a/block", &[], device),
        entry(b'6', b"a/fifo", &[], &[]),
        entry(b'V', b"label", &[], &[]),
        vec![0; 1024],
    ];
    ("kinds", parts.concat(), 0)
}

fn names() -> Seed {
    let long = "n".repeat(255);
    let mut parts = vec![
        entry(b'L', b"././@LongLink", long.as_bytes(), &[]),
        file("short", b"x"),
        entry(b'K', b"././@LongLink", b"short\0", &[]),
        link(b'1', "same", ""),
        entry(b'g', b"global", b"9 a=b\n\n\n\n", &[]),
        entry(b'0', b"name", b"x", &[(345, b"prefix/of/it")]),
        file("./a//b/./c/../d", b"x"),
        file("/absolute", b"x"),
        dir("./"),
    ];
    // More than a block of a directory.
    parts.extend((0..60).map(|n| file(&format!("d/{n:02}{}", "n".repeat(96)), b"")));
    ("names", parts.concat(), 0)
}

fn attributes() -> Seed {
    let value = "v".repeat(300);
    let parts = [
        pax(&[
            ("path", "renamed"),
            ("size", "1"),
            ("uid", "100000"),
            ("gid", "100000"),
            ("mtime", "-1.25"),
            ("SCHILY.xattr.user.a", "1"),
            ("SCHILY.xattr.security.capability", "cap"),
            ("SCHILY.xattr.trusted.b", &value),
            ("SCHILY.xattr.system.posix_acl_access", "acl"),
            ("SCHILY.xattr.system.posix_acl_default", "acl"),
            ("SCHILY.xattr.other.c", "no"),
            ("comment", "ignored"),
        ]),
        file("x", b"1"),
        pax(&[("linkpath", "renamed"), ("SCHILY.xattr.user.a", "1"), ("mtime", "1700000000.5")]),
        link(b'2', "link", "x"),
        pax(&[("path", ""), ("linkpath", ""), ("size", ""), ("uid", ""), ("gid", ""), ("mtime", "")]),
        file("plain", b""),
        // Numbers in binary.
        entry(
            b'0',
            b"binary",
            b"1",
            &[(108, b"\x80\0\0\0\0\x01\x86\xa0"), (136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe")],
        ),
        pax(&[("SCHILY.xattr.user.on-a-directory", &value)]),
        dir("dir"),
    ];
    ("attributes", parts.concat(), 0)
}

fn whiteouts() -> Seed {
    let lower = [
        dir("a"),
        file("a/f", &[7; 5000]),
        file("a/g", b"g"),
        dir("b"),
        dir("b/c"),
        file("b/c/h", b"h"),
        link(b'2', "to-a", "a"),
        link(b'2', "to-root", "/b"),
        link(b'1', "second", "a/f"),
        link(b'2', "loop", "loop"),
        link(b'2', "dangling", "../../x/y"),
        file("packed", &[0; 20_000]),
        dir("gone"),
        file("gone/inside", &[9; 4096]),
    ];
    let upper = [
        file("a/.wh.f", b""),
        file("a/.wh.missing", b""),
        file("none/.wh.missing", b""),
        dir("b"),
        file("b/new", b"n"),
        file("b/.wh..wh..opq", b""),
        file("b/.wh..wh..opq", b""),
        file("none/.wh..wh..opq", b""),
        file(".wh..wh.aufs", b""),
        file("to-a/i", b"i"),
        file("to-root/j", b"j"),
        file("dangling/k", b"k"),
        file("a", b"a file in place of a directory"),
        dir("packed"),
        file(".wh.gone", b""),
        file("b/new", b"again"),
        file("b/.wh.new", b""),
        dir("b"),
        file("b/.wh.c", b""),
        link(b'1', "b/third", "second"),
        link(b'1', "b/third", "second"),
    ];
    let (lower, upper) = (lower.concat(), upper.concat());
    let records = lower.len() / 512;
    ("whiteouts", [lower, upper].concat(), records)
}

/// The four formats of sparse files.
fn sparse() -> Seed {
    let gnu: &[(usize, &[u8])] = &[
        (257, b"ustar  \0"),
        (386, b"00000000000\000000000002\0"),
        (410, b"00000010000\000000000001\0"),
        (482, b"\x01"),
        (483, b"00000100000\0"),
    ];
    let mut more = b"00000040000\000000000001\0".to_vec();
    more.resize(512, 0);
    // The header's size is that of the content, without the records of the map.
    let mut old = entry(b'S', b"old", b"abcd", gnu);
    old.splice(512..512, more);
    let in_content = [&b"2\n0\n1\n8192\n1\n"[..], &[0; 512 - 13], b"ab"].concat();
    let parts = [
        old,
        pax(&[
            ("GNU.sparse.size", "10000"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "1"),
            ("GNU.sparse.numbytes", "2"),
            ("GNU.sparse.offset", "9000"),
            ("GNU.sparse.numbytes", "2"),
        ]),
        file("first", b"abcd"),
        pax(&[("GNU.sparse.name", "second"), ("GNU.sparse.size", "10000"), ("GNU.sparse.map", "0,1,5000,3")]),
        file("x", b"abcd"),
        pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "third"),
            ("GNU.sparse.realsize", "8193"),
        ]),
        file("x", &in_content),
        pax(&[("GNU.sparse.size", "10000"), ("GNU.sparse.map", "")]),
        file("hole", b""),
        // Again, which frees the blocks of the others.
        file("first", b"1"),
        file("second", b"2"),
        file("third", b"3"),
    ];
    ("sparse", parts.concat(), 0)
}

/// Sizes that are not in the archive.
fn large() -> Seed {
    let parts =
        [pax(&[("GNU.sparse.size", "1000000000000"), ("GNU.sparse.map", "999999999999,1")]), file("too-large", b"x")];
    ("large", parts.concat(), 0)
}

/// An archive with a fault each.
fn faults() -> Vec<(&'static str, Vec<u8>)> {
    let sized = |size: &[u8]| entry(b'0', b"f", &[], &[(124, size)]);
    let mapped = |map| [pax(&[("GNU.sparse.size", "10"), ("GNU.sparse.map", map)]), file("f", b"ab")].concat();
    let content = |map: &[u8]| {
        let header = pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "10")]);
        [header, file("f", &[map, &[0; 512]].concat())].concat()
    };
    vec![
        ("unknown-kind", entry(b'?', b"f", &[], &[])),
        ("no-number", sized(b"12x")),
        ("negative", sized(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe")),
        ("too-large-number", sized(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")),
        ("truncated", sized(b"00000001000")),
        ("text", vec![b'a'; 512]),
        ("half-a-header", file("f", b"")[..200].to_vec()),
        ("only-extended", pax(&[("path", "p")])),
        ("long-extended", entry(b'x', b"pax", &[], &[(124, b"77777777777")])),
        ("bad-extended", entry(b'x', b"pax", b"99 a=b\n", &[])),
        ("bad-time", [pax(&[("mtime", "x")]), file("f", b"")].concat()),
        ("overlap", mapped("5,1,0,1")),
        ("odd", mapped("0,1,5")),
        ("overflow", mapped("18446744073709551615,2")),
        ("total", mapped("0,1")),
        ("bad-map", content(b"x\n")),
        ("long-map", content(b"99999999\n")),
        ("outside", file("../../f", b"")),
        ("bad-name", file(&"d/".repeat(45), b"")),
        ("empty-link", link(b'2', "l", "")),
        ("missing-target", link(b'1', "l", "none")),
        ("directory-target", [dir("d"), link(b'1', "l", "d")].concat()),
        ("replaced-target", [file("f", b""), link(b'1', "f/l", "f")].concat()),
        ("root-file", file("/", b"x")),
        ("root-link", [file("f", b""), link(b'1', "/", "f")].concat()),
        ("bad-device", entry(b'3', b"c", &[], &[(329, b"7777777"), (337, b"7777777")])),
        ("empty-whiteout", file("a/.wh.", b"")),
        ("loop", [link(b'2', "l", "l"), file("l/f", b"")].concat()),
        ("large-attributes", [pax(&[("SCHILY.xattr.user.a", &"v".repeat(60_000))]), file("f", b"")].concat()),
    ]
}
