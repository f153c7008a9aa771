//! Root file systems of real images, created by umoci, skopeo and tar, stored in a real registry, and compared file by
//! file.

mod archives;
mod hostile;
mod life;
mod line;
mod parts;
mod registry;
mod run;
mod save;
mod secure;
mod server;
mod shapes;
mod tools;
mod vices;
