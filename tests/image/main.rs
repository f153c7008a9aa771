//! From real images to root file systems: made by umoci, skopeo and tar, kept by a real registry, and compared file by file.

mod archives;
mod hostile;
mod life;
mod line;
mod parts;
mod registry;
mod run;
mod secure;
mod server;
mod shapes;
mod tools;
mod vices;
