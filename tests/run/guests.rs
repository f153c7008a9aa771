//! Prerequisites of tests with real guests (scripts/test): directories given by environment variables. Without them a
//! test is skipped with a visible message.

use std::path::PathBuf;

/// The directory of guests, or `None` with a visible message.
pub fn guest_dir(test: &str) -> Option<PathBuf> {
    provided("HUSK_TEST_GUESTS", "no guests", test)
}

/// The directory in `variable`; if unset, reports that there is `nothing` of the kind.
pub fn provided(variable: &str, nothing: &str, test: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map(PathBuf::from);
    if dir.is_none() {
        eprintln!("SKIPPED {test}: {variable} names {nothing}; `scripts/test guests` runs this");
    }
    dir
}

/// Starts a test that needs guests.
macro_rules! guests {
    () => {{
        fn here() {}
        let Some(guests) = $crate::guests::guest_dir(std::any::type_name_of_val(&here)) else { return };
        guests
    }};
}
pub(crate) use guests;
