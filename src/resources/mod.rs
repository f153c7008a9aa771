//! The only opener of paths.

pub mod host;
pub mod kernel;
pub mod text;
