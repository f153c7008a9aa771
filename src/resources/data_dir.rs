//! Where a user's data is that outlives machines: the image store, with the machines that stay.

use std::path::PathBuf;

/// `$HUSK_DATA`, or `husk` in `$XDG_DATA_HOME` or `~/.local/share`. `None` if none of the variables is set.
pub fn find() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("HUSK_DATA").filter(|dir| !dir.is_empty()) {
        return std::path::absolute(dir).ok();
    }
    // Relative paths must be ignored (XDG base directory specification).
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")))?;
    Some(base.join("husk"))
}
