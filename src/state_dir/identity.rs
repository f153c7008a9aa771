//! What distinguishes a machine with husk's init from others that run the same: part of its record, and of its snapshots, so that
//! machines restored from them differ in what they must not share.

use std::net::IpAddr;

use husk_protocol::InterfaceAddress;
use serde::{Deserialize, Serialize};

/// The identity of a machine, as far as its configuration does not contain it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityRecord {
    /// The ID of the machine.
    pub machine: String,
    /// The host name.
    pub hostname: String,
    /// Whether the user chose it; otherwise it is the machine's name or ID.
    pub is_hostname_chosen: bool,
    /// The DNS servers that the user chose in place of the networks'.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// The names that the user has added to those of the networks.
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    pub names: Names,
    /// Of each network interface, in configuration order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceRecord>,
}

/// Names of hosts, and how others are resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Names {
    /// Host names and their addresses; without one, an address at which the machine reaches its host.
    pub hosts: Vec<(String, Option<IpAddr>)>,
    /// Search domains in place of the host's; only `.` for none.
    pub search: Vec<String>,
    /// Options of the resolver in place of the host's.
    pub options: Vec<String>,
    /// The machine's domain.
    pub domain: Option<String>,
}

impl Names {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Names::default()
    }
}

/// The addresses of an interface, unless the guest gets them by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceRecord {
    /// Its own.
    pub addresses: Vec<InterfaceAddress>,
    /// The default gateways.
    pub gateways: Vec<IpAddr>,
    /// More names on a shared network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}
