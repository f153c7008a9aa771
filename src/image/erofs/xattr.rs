//! Encodes extended attributes after an inode (linux, fs/erofs/erofs_fs.h: `erofs_xattr_ibody_header`,
//! `erofs_xattr_entry`).

use crate::image::tree::Xattr;

const HEADER_BYTES: usize = 12;
/// The size field has sixteen bits and counts units of four bytes.
const MAX_BYTES: usize = HEADER_BYTES + 4 * (u16::MAX as usize - 1);

/// A name is stored as a prefix number and the rest, which is empty for the two complete names.
const PREFIXES: [(u8, &[u8]); 5] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
];

/// Whether a name is supported: EROFS knows these namespaces.
pub fn is_supported(name: &[u8]) -> bool {
    split(name).is_some()
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(index, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        // A namespace must be followed by a name, a complete name by nothing.
        (rest.is_empty() != prefix.ends_with(b".")).then_some((index, rest))
    })
}

/// The encoded size; zero without attributes.
pub fn encoded_bytes(xattrs: &[Xattr]) -> usize {
    let entries: usize = xattrs.iter().filter_map(entry_bytes).sum();
    if entries == 0 { 0 } else { HEADER_BYTES + entries }
}

/// Whether an inode can hold all of them.
pub fn fit(xattrs: &[Xattr]) -> bool {
    encoded_bytes(xattrs) <= MAX_BYTES
        && xattrs.iter().all(|xattr| xattr.value.len() <= u16::MAX.into() && xattr.name.len() <= u8::MAX.into())
}

/// The size field of the inode (`i_xattr_icount`).
pub fn count(xattrs: &[Xattr]) -> u16 {
    match encoded_bytes(xattrs) {
        0 => 0,
        bytes => u16::try_from((bytes - HEADER_BYTES) / 4 + 1).unwrap_or(u16::MAX),
    }
}

fn entry_bytes(xattr: &Xattr) -> Option<usize> {
    let (_, rest) = split(&xattr.name)?;
    Some((4 + rest.len() + xattr.value.len()).next_multiple_of(4))
}

/// Appends the encoded attributes.
pub fn encode(xattrs: &[Xattr], output: &mut Vec<u8>) {
    if encoded_bytes(xattrs) == 0 {
        return;
    }
    output.extend([0; HEADER_BYTES]);
    for xattr in xattrs {
        let Some((index, rest)) = split(&xattr.name) else { continue };
        let end = output.len() + (4 + rest.len() + xattr.value.len()).next_multiple_of(4);
        output.extend([rest.len() as u8, index]);
        output.extend((xattr.value.len() as u16).to_le_bytes());
        output.extend(rest);
        output.extend(&xattr.value);
        output.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &str, value: &[u8]) -> Xattr {
        Xattr { name: name.as_bytes().into(), value: value.into() }
    }

    #[test]
    fn size_and_count_are_those_of_the_bytes() {
        for xattrs in [
            vec![],
            vec![xattr("user.a", b"")],
            vec![xattr("security.capability", &[1; 20]), xattr("system.posix_acl_access", &[2; 28])],
            vec![xattr("btrfs.compression", b"no such namespace here")],
        ] {
            let mut bytes = Vec::new();
            encode(&xattrs, &mut bytes);
            assert_eq!(bytes.len(), encoded_bytes(&xattrs));
            let counted = match count(&xattrs) {
                0 => 0,
                count => HEADER_BYTES + 4 * (usize::from(count) - 1),
            };
            assert_eq!(counted, bytes.len());
        }
    }

    #[test]
    fn attributes_that_do_not_fit_are_reported() {
        assert!(fit(&[xattr("user.a", &[0; 65535])]));
        assert!(!fit(&[xattr("user.a", &[0; 65536])]));
        assert!(!fit(&vec![xattr("user.a", &[0; 65535]); 5]));
    }

    #[test]
    fn a_namespace_needs_a_name() {
        assert!(is_supported(b"user.x") && is_supported(b"system.posix_acl_access"));
        for name in [&b"user."[..], b"user", b"system.posix_acl_accessx", b"system.x", b"", b"x"] {
            assert!(!is_supported(name), "{name:?}");
        }
    }
}
