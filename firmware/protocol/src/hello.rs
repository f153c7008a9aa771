//! The hello at the start of every connection, which identifies its session and role.

use serde::{Deserialize, Serialize};

use crate::{Malformed, VERSION};

/// The size of a hello.
pub const HELLO_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"husk";

/// The role of a connection in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Control messages in both directions.
    Control,
    /// Data for the process's standard input.
    Stdin,
    /// Data of its standard output; with a terminal, of both outputs.
    Stdout,
    /// Data of its standard error.
    Stderr,
}

const ROLES: [Role; 4] = [Role::Control, Role::Stdin, Role::Stdout, Role::Stderr];

/// The first message of the connecting side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The session's ID.
    pub session: u64,
    /// The role.
    pub role: Role,
}

impl Hello {
    /// Serializes the hello: magic, version, role, zero, session; little-endian.
    pub fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.role as u8;
        bytes[8..].copy_from_slice(&self.session.to_le_bytes());
        bytes
    }

    /// Parses a hello.
    pub fn from_bytes(bytes: [u8; HELLO_BYTES]) -> Result<Hello, Malformed> {
        let [m0, m1, m2, m3, v0, v1, role, _, session @ ..] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed::Magic);
        }
        match u16::from_le_bytes([v0, v1]) {
            VERSION => {}
            other => return Err(Malformed::Version(other)),
        }
        let role = *ROLES.get(usize::from(role)).ok_or(Malformed::Role(role))?;
        Ok(Hello { session: u64::from_le_bytes(session), role })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_survives_a_round_trip() {
        for role in ROLES {
            let hello = Hello { session: 0x0102_0304_0506_0708, role };
            assert_eq!(Hello::from_bytes(hello.to_bytes()), Ok(hello));
        }
    }

    #[test]
    fn another_protocol_version_or_role_is_rejected() {
        let with = |at: usize, value: u8| {
            let mut bytes = Hello { session: 1, role: Role::Stdin }.to_bytes();
            bytes[at] = value;
            Hello::from_bytes(bytes)
        };
        assert_eq!(with(0, b'H'), Err(Malformed::Magic));
        assert_eq!(with(4, 99), Err(Malformed::Version(99)));
        assert_eq!(with(6, 4), Err(Malformed::Role(4)));
    }
}
