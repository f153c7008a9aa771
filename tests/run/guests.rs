//! What tests of real guests are provided with (scripts/test): directories that variables name. Without them a test
//! skips, loudly.

use std::path::PathBuf;

/// The directory of guests, or `None` and a loud word.
pub fn guest_dir(test: &str) -> Option<PathBuf> {
    provided("HUSK_TEST_GUESTS", "no guests", test)
}

/// The directory that `variable` names; where it is not set it names `nothing` of what is wanted.
pub fn provided(variable: &str, nothing: &str, test: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map(PathBuf::from);
    if dir.is_none() {
        eprintln!("SKIPPED {test}: {variable} names {nothing}; `scripts/test guests` runs this");
    }
    dir
}

/// Begins a test that needs guests.
macro_rules! guests {
    () => {{
        fn here() {}
        let Some(guests) = $crate::guests::guest_dir(std::any::type_name_of_val(&here)) else { return };
        guests
    }};
}
pub(crate) use guests;
