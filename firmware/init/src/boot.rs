//! Early boot: mounts, drivers and the configuration; or passes control to another init.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::path::Path;

use husk_protocol::{SPEC_PATH, Spec};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, umask};

use crate::errors::{Context, Failure};
use crate::root::mount_at;

/// The paths of init in the order in which Linux tries them, followed by systemd's.
pub const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/usr/lib/systemd/systemd"];

/// Sets up device nodes and drivers, which the initramfs lacks. Returns the configuration.
pub fn prepare() -> Result<Spec, Failure> {
    umask(Mode::from_bits_truncate(0o022));
    mount_at("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755")?;
    let bytes = fs::read(SPEC_PATH).context("read the machine's configuration")?;
    let spec = Spec::from_bytes(&bytes).map_err(|error| Failure::new(format_args!("read {SPEC_PATH}: {error}")))?;
    for module in &spec.modules {
        load(module)?;
    }
    // Frees their memory.
    let _ = (fs::remove_file(SPEC_PATH), fs::remove_dir_all("/modules"));
    Ok(spec)
}

fn load(module: &str) -> Result<(), Failure> {
    let what = || format!("load kernel module {module}");
    let file = File::open(module).context(what())?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        // The driver is built in, or its device does not exist; a dependent step reports that if necessary.
        Ok(()) | Err(nix::Error::EEXIST | nix::Error::ENODEV) => Ok(()),
        Err(error) => Err(error).context(what()),
    }
}

/// Executes the root file system's own init in this process. Returns only on failure.
pub fn become_init(args: &[Vec<u8>]) -> Failure {
    let args: Vec<CString> = args.iter().filter_map(|arg| CString::new(arg.as_slice()).ok()).collect();
    let env = [c"HOME=/", c"TERM=linux", c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];
    let exec = |program: &CStr, args: &[CString]| nix::unistd::execve(program, args, &env).unwrap_err();
    if let Some(program) = args.first() {
        let error = exec(program, &args);
        return Failure::new(format_args!("start {}: {}", program.to_string_lossy(), error.desc()));
    }
    for program in INITS.iter().filter(|program| Path::new(program).exists()) {
        let Ok(program) = CString::new(*program) else { continue };
        let error = exec(&program, std::slice::from_ref(&program));
        crate::report::say(&format!("start {}: {}", program.to_string_lossy(), error.desc()));
    }
    Failure::new("the root filesystem has no init: use --os-init PATH to select one")
}
