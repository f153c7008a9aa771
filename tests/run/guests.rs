//! What tests of real guests are provided with (scripts/test): folders that variables name. Without them a test skips, loudly.

use std::path::PathBuf;

/// The folder of guests, or `None` and a loud word.
pub fn guest_folder(test: &str) -> Option<PathBuf> {
    provided("HUSK_TEST_GUESTS", "no guests", test)
}

/// The folder that `variable` names; where it is not set it names `nothing` of what is wanted.
pub fn provided(variable: &str, nothing: &str, test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(variable).map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIPPED {test}: {variable} names {nothing}; `scripts/test guests` runs this");
    }
    folder
}

/// Begins a test that needs guests.
macro_rules! guests {
    () => {{
        fn here() {}
        let Some(guests) = $crate::guests::guest_folder(std::any::type_name_of_val(&here)) else { return };
        guests
    }};
}
pub(crate) use guests;
