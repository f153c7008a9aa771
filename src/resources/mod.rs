//! The only opener of paths.

pub mod host;
pub mod text;
