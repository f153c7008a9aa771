//! The keys with which a user leaves an attached machine running.

use std::str::FromStr;

/// A sequence of keys, Ctrl-P Ctrl-Q by default, as in Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
    /// The last keys typed, fewer than there are in the sequence.
    typed: Vec<u8>,
}

impl Default for DetachKeys {
    fn default() -> DetachKeys {
        DetachKeys { keys: vec![0x10, 0x11], typed: Vec::new() }
    }
}

impl DetachKeys {
    /// Whether the sequence ends in `bytes`, in which the next keys arrive. Never, if there are no keys.
    pub fn are_in(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|key| {
            self.typed.push(*key);
            let excess = self.typed.len().saturating_sub(self.keys.len());
            self.typed.drain(..excess);
            !self.keys.is_empty() && self.typed == self.keys
        })
    }
}

/// Parses Docker's syntax: `ctrl-p,ctrl-q`, `ctrl-@,x`; empty for no keys.
impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<DetachKeys, String> {
        let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
            (None, [key @ 0x21..=0x7e]) => Some(*key),
            (Some(letter), _) => match letter.as_bytes() {
                [letter] => Some(letter.to_ascii_uppercase())
                    .filter(|letter| (b'@'..=b'_').contains(letter))
                    .map(|key| key & 0x1f),
                _ => None,
            },
            _ => None,
        };
        let words = text.split(',').filter(|_| !text.is_empty());
        let keys: Option<Vec<u8>> = words.map(key).collect();
        let keys = keys.ok_or_else(|| format!("{text:?} are not detach keys: use a sequence such as ctrl-p,ctrl-q"))?;
        Ok(DetachKeys { keys, typed: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_keys_are_recognized_in_sequence() {
        for pieces in [&[&b"ab\x10\x11c"[..]][..], &[b"\x10", b"\x11"], &[b"\x10\x10\x11"]] {
            let mut keys = DetachKeys::default();
            assert!(pieces.iter().any(|piece| keys.are_in(piece)), "{pieces:?}");
        }
        let mut keys = DetachKeys::default();
        assert!(![&b"\x10a\x11"[..], b"\x11\x10"].iter().any(|piece| keys.are_in(piece)));
    }

    #[test]
    fn detach_keys_have_dockers_syntax() {
        let found = |text: &str, typed: &[u8]| text.parse::<DetachKeys>().unwrap().are_in(typed);
        assert!(found("ctrl-x", b"\x18") && found("ctrl-@,a", b"\0a") && found("a,b,ctrl-[", b"ab\x1b"));
        assert!(!found("", b"\x10\x11") && !found("ctrl-x,x", b"x\x18"));
        for wrong in ["ctrl-", "ctrl-1", "ab", ",", "ctrl-p,", "é"] {
            assert!(wrong.parse::<DetachKeys>().unwrap_err().contains("ctrl-p,ctrl-q"), "{wrong}");
        }
    }
}
