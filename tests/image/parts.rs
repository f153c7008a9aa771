//! Archives and images constructed byte by byte, in formats of tools that are not installed.

use std::fs;

use husk::image::Digest;
use serde_json::{Value, json};

use crate::tools::House;

/// A ustar header with a checksum.
pub fn header(name: &[u8], kind: u8, size: &[u8], link: &[u8]) -> Vec<u8> {
    let mut record = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name);
    put(100, if kind == b'2' { b"0000777\0" } else { b"0000644\0" });
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, size);
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link);
    put(257, b"ustar\x0000");
    if matches!(kind, b'3' | b'4') {
        // A device number in place of a link target.
        put(157, &[0; 16]);
        put(329, link.get(..8).unwrap_or(b"0000001\0"));
        put(337, link.get(8..).unwrap_or(b"0000003\0"));
    }
    let sum: u32 = record.iter().map(|&byte| u32::from(byte)).sum();
    record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    record
}

pub fn entry(name: &str, kind: u8, content: &[u8], link: &str) -> Vec<u8> {
    let mut bytes = header(name.as_bytes(), kind, format!("{:011o}\0", content.len()).as_bytes(), link.as_bytes());
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A POSIX extended header.
pub fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let records = records.iter().map(|(keyword, value)| {
        let rest = format!(" {keyword}={value}\n");
        let len = (rest.len()..).find(|len| len.to_string().len() + rest.len() == *len).unwrap();
        format!("{len}{rest}")
    });
    entry("PaxHeaders/x", b'x', records.collect::<String>().as_bytes(), "")
}

/// An archive of files; contents that start with `->` are links.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let file = |(name, content): &(&str, &[u8])| match content.strip_prefix(b"->") {
        Some(target) => entry(name, b'2', b"", str::from_utf8(target).unwrap()),
        None => entry(name, b'0', content, ""),
    };
    [files.iter().flat_map(file).collect(), vec![0; 1024]].concat()
}

/// The hexadecimal digest of some content.
pub fn hex(content: &[u8]) -> String {
    Digest::of(content).hex()
}

/// The configuration of an image with these layers and the command `/bin/sh`.
pub fn config(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string()
    .into_bytes()
}

/// Docker's manifest of one image.
pub fn docker_list(config: &str, layers: &[&str]) -> Vec<u8> {
    json!([{"Config": config, "RepoTags": ["own:1"], "Layers": layers}]).to_string().into_bytes()
}

pub fn descriptor(content: &[u8]) -> Value {
    json!({"digest": Digest::of(content).to_string(), "size": content.len()})
}

/// Adds a key to a descriptor.
pub fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
    descriptor[key] = value;
    descriptor
}

/// An index of images.
pub fn index(manifests: &[Value]) -> Vec<u8> {
    json!({"schemaVersion": 2, "manifests": manifests}).to_string().into_bytes()
}

/// Writes a layout as an archive, `NAME.tar`, and as a directory, `NAME`.
pub fn write_layout(house: &House, name: &str, index: &[u8], blobs: &[&[u8]]) {
    let names: Vec<String> = blobs.iter().map(|blob| format!("blobs/sha256/{}", hex(blob))).collect();
    let mut files: Vec<(&str, &[u8])> =
        vec![("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#), ("index.json", index)];
    files.extend(names.iter().map(String::as_str).zip(blobs.iter().copied()));
    fs::write(house.path(&format!("{name}.tar")), tar(&files)).unwrap();
    house.sh(&format!("rm -rf {name}; mkdir {name}; tar -C {name} -xf {name}.tar"));
}
