//! Capabilities by name, as Docker's `--cap-add` and `--cap-drop` take them.

/// The capabilities of Linux, in numerical order (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// All capabilities, a bit for each.
const ALL: u64 = (1 << NAMES.len()) - 1;

/// The names of all capabilities, as Linux has them.
pub fn names() -> Vec<String> {
    NAMES.iter().map(|name| format!("CAP_{name}")).collect()
}

/// The bits of `NET_ADMIN`, `cap_net_admin`, several of them with commas in between, or `ALL`.
pub fn mask(text: &str) -> Result<u64, String> {
    let bit = |word: &str| {
        let name = word.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        match NAMES.iter().position(|known| *known == name) {
            Some(number) => Ok(1 << number),
            None if name == "ALL" => Ok(ALL),
            None => Err(format!("{word:?} is not a capability: use a name such as NET_ADMIN, or ALL")),
        }
    };
    text.split(',').try_fold(0, |mask, word| Ok(mask | bit(word)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_has_its_number_in_the_kernel() {
        assert_eq!(mask("CHOWN"), Ok(1));
        assert_eq!(mask("cap_net_admin"), Ok(1 << 12));
        assert_eq!(mask("CAP_SYS_ADMIN,KILL"), Ok(1 << 21 | 1 << 5));
        assert_eq!(mask("checkpoint_restore"), Ok(1 << 40));
        assert_eq!(mask("all"), Ok((1 << 41) - 1));
        for wrong in ["", "NET", "CAP_", "KILL,"] {
            assert!(mask(wrong).unwrap_err().contains("NET_ADMIN, or ALL"), "{wrong}");
        }
    }
}
