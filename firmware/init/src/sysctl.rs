//! Sets kernel parameters, which in a machine are those of its own kernel.

use std::fs;
use std::path::PathBuf;

use crate::errors::{Context, Failure};

/// Sets each parameter to its value, in order.
pub fn set_all(parameters: &[(String, String)]) -> Result<(), Failure> {
    parameters.iter().try_for_each(|(name, value)| {
        fs::write(path(name), value).context(format_args!("set the kernel parameter {name} to {value:?}"))
    })
}

/// The file of a parameter: as sysctl(8) does, dots separate unless the first separator is a slash.
fn path(name: &str) -> PathBuf {
    let is_path = name.find(['.', '/']).is_some_and(|at| name.as_bytes().get(at) == Some(&b'/'));
    let swap = |c: char| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let file: String = if is_path { name.to_owned() } else { name.chars().map(swap).collect() };
    PathBuf::from("/proc/sys").join(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_has_dots_or_slashes() {
        assert_eq!(path("net.core.somaxconn"), PathBuf::from("/proc/sys/net/core/somaxconn"));
        assert_eq!(path("net/ipv4/conf/a.b/forwarding"), PathBuf::from("/proc/sys/net/ipv4/conf/a.b/forwarding"));
        assert_eq!(path("net.ipv4.conf.a/b.forwarding"), PathBuf::from("/proc/sys/net/ipv4/conf/a.b/forwarding"));
    }
}
