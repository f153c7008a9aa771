//! `husk bench`: the same work in machines, in containers and on the bare host, and what the difference is.
//!
//! ```text
//! IMAGE ─ ground ─> one root, as a folder and as a disk, with the work program in it
//! host ─ contender::find ─> those present, those absent
//! scenarios ─ rounds (A B C A B C …) ─ contender::launch ─ run: times of marks, taken here ─> samples
//! samples ─ statistics, verdict ─> result::Report ─> table, JSON, page, compare
//! ```
//!
//! The work program (`firmware/work`) reads no clock: it says that it begins and that it has ended, and all times are this
//! process's own. What a contender gets is the same file, the same arguments and the same limits.

pub mod amounts;
pub mod compare;
pub mod contender;
pub mod page;
pub mod ground;
pub mod result;
pub mod run;
pub mod scenario;
pub mod work;
#[doc(hidden)]
pub mod sample;
pub mod statistics;
pub mod table;
pub mod text;
pub mod verdict;
