//! The only opener of paths.

pub mod disk;
pub mod host;
pub mod kernel;
pub mod text;
