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
    /// Of each network interface, in configuration order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceRecord>,
}

/// The addresses of an interface, unless the guest gets them by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceRecord {
    /// Its own.
    pub addresses: Vec<InterfaceAddress>,
    /// The default gateways.
    pub gateways: Vec<IpAddr>,
}
