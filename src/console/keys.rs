//! Separates commands to husk, which start with Ctrl-A, from keys for the guest.

/// Ctrl-A, the prefix of a command to husk.
const ESCAPE: u8 = 0x01;

/// The text printed by `Ctrl-A h`.
pub const HELP: &str = "
Ctrl-A x   quit (terminate the machine)
Ctrl-A p   press the power button
Ctrl-A a   send Ctrl-A to the guest
Ctrl-A h   show this help
";

/// A command to husk itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End the machine immediately.
    Quit,
    /// Press the power button.
    PowerButton,
    /// Print the available commands.
    Help,
}

/// The parser's state; remembers a Ctrl-A between reads.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends the bytes of `typed` that are meant for the guest to `guest`, and returns the commands in order.
    pub fn sort(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &key in typed {
            if !std::mem::take(&mut self.escaped) {
                match key {
                    ESCAPE => self.escaped = true,
                    key => guest.push(key),
                }
                continue;
            }
            match key {
                b'x' => commands.push(Command::Quit),
                b'p' => commands.push(Command::PowerButton),
                b'h' | b'?' => commands.push(Command::Help),
                b'a' | ESCAPE => guest.push(ESCAPE),
                other => guest.extend([ESCAPE, other]),
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sort(reads: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut keys, mut guest, mut commands) = (Keys::default(), Vec::new(), Vec::new());
        for read in reads {
            commands.extend(keys.sort(read, &mut guest));
        }
        (guest, commands)
    }

    #[test]
    fn keys_reach_the_guest_unchanged() {
        assert_eq!(sort(&[b"ls\r", b"\x03\x1b[A"]), (b"ls\r\x03\x1b[A".to_vec(), vec![]));
    }

    #[test]
    fn ctrl_a_starts_a_command_even_across_reads() {
        assert_eq!(sort(&[b"ab\x01", b"xc"]), (b"abc".to_vec(), vec![Command::Quit]));
        assert_eq!(sort(&[b"\x01h\x01p"]), (vec![], vec![Command::Help, Command::PowerButton]));
    }

    #[test]
    fn ctrl_a_itself_can_be_sent() {
        assert_eq!(sort(&[b"\x01a\x01\x01\x01q"]), (b"\x01\x01\x01q".to_vec(), vec![]));
    }
}
