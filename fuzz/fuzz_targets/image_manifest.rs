//! Parses manifests and configurations from registries and archives, and image names typed by users.
//!
//! The parser of a user's words is in `image/source.rs`, most of which reads files instead, and is not counted.
//!
//! Covers: image/manifest.rs image/config.rs image/reference.rs image/digest.rs
#![no_main]

use std::fs;
use std::io::Read;
use std::path::Path;

use husk::image::digest::Hashing;
use husk::image::reference::{self, Reference};
use husk::image::{Digest, Source, fuzzing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    fuzzing::json(bytes);
    check_digest(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = text.parse::<Source>();
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
        assert_eq!(format!("{digest:?}"), text);
        assert!(digest.hex().starts_with(&digest.short()));
        assert_eq!(Digest::from_hex(&digest.hex()), Some(digest));
    }
    if let Ok(reference) = text.parse::<Reference>() {
        // The full name and the short name refer to the same image.
        assert_eq!(reference.to_string().parse::<Reference>().ok().as_ref(), Some(&reference), "{reference}");
        assert!(reference::same_name(&reference.familiar(), text), "{}", reference.familiar());
        assert!(!reference.repository.split('/').any(|name| name == ".."));
        assert!(reference.to_string().ends_with(&reference.version()));
    }
});

/// What is read through a hash has the digest of the whole, and no other.
fn check_digest(bytes: &[u8]) {
    let mut read = Vec::new();
    let mut hashing = Hashing::new(bytes);
    hashing.read_to_end(&mut read).expect("it is memory");
    let hasher = hashing.into_hasher();
    assert_eq!((hasher.len_bytes(), hasher.digest()), (bytes.len() as u64, Digest::of(bytes)));
    let unread = Hashing::new(bytes);
    assert_eq!(unread.verify(Digest::of(bytes)).is_ok(), bytes.is_empty());
}

/// Writes the initial corpus: manifests, indexes and configurations, names, and faults of each.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/image_manifest"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let digest = format!("sha256:{}", "0a".repeat(32));
    let part = format!(r#"{{"mediaType":"","digest":"{digest}","size":7}}"#);
    let image = |platform: &str| {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":7,"annotations":{{"a":"b"}}{platform}}}"#)
    };
    let platform = |os: &str, architecture: &str, variant: &str| {
        image(&format!(r#","platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}"#))
    };
    let index = |images: &[String]| format!(r#"{{"manifests":[{}]}}"#, images.join(","));
    let any = platform("linux", "amd64", "");
    let other = platform("linux", "arm64", "v8");
    let newer = ["v1", "v2", "v3", "v4", "v9", "x"].map(|variant| platform("linux", "amd64", variant));
    let config = |config: &str, rootfs: &str| {
        format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","config":{config},"rootfs":{rootfs}}}"#
        )
    };
    let layers = format!(r#"{{"type":"layers","diff_ids":["{digest}"]}}"#);
    let process = r#"{"User":"1:2","Env":["A=B"],"Entrypoint":["/a"],"Cmd":["b"],"WorkingDir":"/w","StopSignal":"SIGINT",
        "Volumes":{"/v":{}},"ExposedPorts":{"80/tcp":{}},"Labels":{"l":"m"}}"#;
    let windows = config(process, &layers).replace("linux", "windows");
    let large = config(&format!(r#"{{"User":"{}"}}"#, "u".repeat(1 << 20)), &layers);
    let many = |count| vec![format!("\"{digest}\""); count].join(",");
    let too_many = config("null", &format!(r#"{{"diff_ids":[{}]}}"#, many(600)));
    let challenge =
        r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull""#;
    let seeds = [
        ("image", format!(r#"{{"config":{part},"layers":[{part},{part}]}}"#)),
        ("version-1", r#"{"schemaVersion":1}"#.into()),
        ("image-and-index", format!(r#"{{"config":{part},"manifests":[]}}"#)),
        ("index", index(&[other.clone(), any.clone()])),
        ("newer", index(&newer)),
        ("others", index(&[other.clone(), platform("windows", "amd64", ""), platform("unknown", "unknown", "")])),
        ("silent", index(&[other.clone(), image("")])),
        ("silent-twice", index(&[image(""), image("").replace("0a0a", "0b0b")])),
        ("attestation", index(&[image("").replace(r#""a""#, r#""vnd.docker.reference.type""#)])),
        ("none", index(&[])),
        ("too-many", index(&vec![any; 1100])),
        ("config", config(process, &layers)),
        ("config-empty", config("null", r#"{"type":null,"diff_ids":null}"#)),
        ("config-other", config("{}", r#"{"type":"other"}"#)),
        ("config-windows", windows),
        ("config-large", large),
        ("config-layers", too_many),
        ("challenge", challenge.into()),
        ("digest", digest.clone()),
        ("name", "debian".into()),
        ("name-full", format!("registry.example:5000/team/app_a/b--c.d:tag@{digest}")),
        ("name-index", "index.docker.io/library/debian:12".into()),
        ("name-local", "localhost/app:v1.0-rc_1".into()),
        ("name-bad-host", "-a.example/app".into()),
        ("name-bad-port", "a.example:0/app".into()),
        ("name-bad-part", "a/_b".into()),
        ("name-bad-tag", "a:.b".into()),
        ("name-bad-digest", "a@sha256:0".into()),
        ("name-long", "a/".repeat(200) + "b"),
        ("source", "oci-archive:/path.tar:name".into()),
    ];
    for (name, text) in seeds {
        fs::write(corpus.join(name), text).expect("the corpus can be written");
    }
}
