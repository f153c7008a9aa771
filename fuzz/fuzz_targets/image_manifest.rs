//! Parses manifests and configurations from registries and archives, and image sources typed by users.
//!
//! Covers: image/manifest.rs image/config.rs image/reference.rs image/source.rs image/digest.rs
#![no_main]

use husk::image::reference::Reference;
use husk::image::{Digest, Source, fuzzing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::json(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = text.parse::<Source>();
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(reference) = text.parse::<Reference>() {
        // The full name and the short name refer to the same image.
        assert_eq!(reference.to_string().parse::<Reference>().ok().as_ref(), Some(&reference), "{reference}");
        assert_eq!(
            reference.familiar().parse::<Reference>().ok().as_ref(),
            Some(&reference),
            "{}",
            reference.familiar()
        );
        assert!(!reference.repository.split('/').any(|name| name == ".."));
    }
});
