//! From a network's configuration to the host's side of an interface: a tap device, or passt and a socket to it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use sha2::{Digest, Sha256};

use super::{bridge, passt};
use crate::backend::net::{HEADER_BYTES, NetBackend, TapNet};
use crate::backend::rate::Rate;
use crate::config::{Attachment, MacAddress, NetworkConfig};
use crate::sys;

const TUN_PATH: &str = "/dev/net/tun";
/// Names of tap devices on bridges; the kernel counts.
const TAP_NAMES: &str = "husktap%d";
/// The largest packet that a tap device may be set to carry, and virtio's driver too.
const MTU_BYTES_MAX: u32 = 65535;

/// An interface's host side, open.
pub struct Network {
    /// Takes and has the frames.
    pub backend: Box<dyn NetBackend>,
    /// For the log.
    pub name: String,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest packet that the other side carries, if it says so.
    pub mtu_bytes: Option<u16>,
    /// What may go through in a second, in each direction.
    pub rate: Rate,
}

/// Opens what `config` says. For a user's network this starts passt, which is not waited for.
pub fn open(config: &NetworkConfig) -> Result<Network> {
    open_any(config).map(|network| Network { rate: config.rate, ..network })
}

fn open_any(config: &NetworkConfig) -> Result<Network> {
    let mac = match config.mac {
        Some(mac) => mac,
        None => random_mac()?,
    };
    match &config.to {
        Attachment::User(user) => {
            let backend = Box::new(passt::start(user)?);
            let rate = Rate::default();
            Ok(Network { backend, name: "passt".into(), mac: mac.0, mtu_bytes: Some(passt::MTU_BYTES), rate })
        }
        Attachment::Tap { name } => {
            let (tap, _) = open_tap(name).with_context(|| format!("open tap device {name}"))?;
            on_tap(tap, name, mac)
        }
        Attachment::Bridge { name } => {
            let (tap, own_name) = open_tap(TAP_NAMES).with_context(|| format!("make a tap device for {name}"))?;
            bridge::attach(&own_name, name)?;
            on_tap(tap, &own_name, mac)
        }
    }
}

fn on_tap(tap: File, name: &str, mac: MacAddress) -> Result<Network> {
    let mtu = sys::net::interface_mtu(name).with_context(|| format!("look at tap device {name}"))?;
    let mtu_bytes = u16::try_from(mtu.min(MTU_BYTES_MAX)).ok();
    let backend = Box::new(TapNet::new(tap));
    Ok(Network { backend, name: name.to_owned(), mac: mac.0, mtu_bytes, rate: Rate::default() })
}

/// Returns the device and its name.
fn open_tap(name: &str) -> Result<(File, String)> {
    let tun = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN_PATH);
    let tun = tun.map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound => "load it with `sudo modprobe tun`",
            _ => "see `husk doctor`",
        };
        anyhow!(error).context(format!("open {TUN_PATH} ({advice})"))
    })?;
    let name = sys::net::attach_tap(&tun, name, HEADER_BYTES).map_err(|error| {
        let make = format!("make it with `sudo ip tuntap add {name} mode tap user $USER vnet_hdr`");
        let advice = match error.raw_os_error() {
            Some(libc::EPERM) if Path::new("/sys/class/net").join(name).exists() => {
                format!("it is another user's: {make}")
            }
            Some(libc::EPERM) => make,
            Some(libc::EBUSY) => "another machine has it".into(),
            Some(libc::EINVAL) => {
                format!("it is no tap device for one queue with virtio headers: {make}")
            }
            _ => return anyhow!(error),
        };
        anyhow!(error).context(advice)
    })?;
    Ok((tun, name))
}

/// The address of interface `index` of the machine `name`: the same whenever it is asked for on this host, another on
/// another host, and another for another name, as far as 46 bits tell them apart.
pub fn mac_of(name: &str, index: usize) -> MacAddress {
    // A host without an identity has machines like those of any such host.
    let host = fs::read("/etc/machine-id").unwrap_or_default();
    let digest = Sha256::new().chain_update(b"husk mac\0").chain_update(&host).chain_update([0]).chain_update(name);
    let digest: [u8; 32] = digest.chain_update([0]).chain_update(index.to_le_bytes()).finalize().into();
    MacAddress::local([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5]])
}

fn random_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    sys::getrandom(&mut bytes).context("choose a MAC address")?;
    Ok(MacAddress::local(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_address_is_its_names() {
        let web = mac_of("web", 0);
        assert_eq!(web, mac_of("web", 0));
        assert!(web != mac_of("db", 0) && web != mac_of("web", 1));
        assert_eq!(web.to_string().parse(), Ok(web));
        assert_ne!(random_mac().unwrap(), random_mac().unwrap());
    }
}
