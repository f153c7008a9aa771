//! Pages outside of memory, and statistics that make no sense.

use crate::arena::{on_both_buses, rounds};
use husk_guests as guests;

#[test]
fn a_balloon_takes_only_what_is_the_guests() {
    needs_kvm!();
    on_both_buses(guests::PAGES, &rounds(100));
}
