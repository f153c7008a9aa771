//! The only opener of paths.
