//! Framing of messages on a byte stream: each is preceded by its length, four bytes little-endian.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Malformed;

/// A message with a maximum size.
pub trait Message: Serialize + DeserializeOwned {
    /// The maximum size, excluding the length field.
    const MAX_BYTES: usize;
}

const LENGTH_BYTES: usize = 4;

/// Appends `message` to `out`. Fails without any change if it is too long.
pub fn write<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), Malformed> {
    let bytes = postcard::to_allocvec(message).map_err(|_| Malformed::Content)?;
    let len = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= M::MAX_BYTES);
    let len = len.ok_or(Malformed::TooLong(bytes.len()))?;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&bytes);
    Ok(())
}

/// Buffers received data. It holds at most one message of maximum length and one read.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
}

impl Reader {
    /// Adds received data. Afterwards [`Reader::take`] must be called until it returns `None`.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete message, if there is one. After an error the stream is unusable.
    pub fn take<M: Message>(&mut self) -> Result<Option<M>, Malformed> {
        let Some((length, rest)) = self.bytes.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let len = u32::from_le_bytes(*length) as usize;
        if len > M::MAX_BYTES {
            return Err(Malformed::TooLong(len));
        }
        let Some(bytes) = rest.get(..len) else { return Ok(None) };
        let message = match postcard::take_from_bytes(bytes) {
            Ok((message, [])) => message,
            _ => return Err(Malformed::Content),
        };
        self.bytes.drain(..LENGTH_BYTES + len);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ToGuest, ToHost, WindowSize};

    #[test]
    fn messages_arrive_in_order_however_they_are_split() {
        let sent = [ToGuest::Signal(15), ToGuest::Resize(WindowSize { rows: 24, columns: 80 }), ToGuest::Finish];
        let mut bytes = Vec::new();
        sent.iter().for_each(|message| write(message, &mut bytes).unwrap());
        for size in 1..bytes.len() {
            let (mut reader, mut got) = (Reader::default(), Vec::new());
            for piece in bytes.chunks(size) {
                reader.push(piece);
                while let Some(message) = reader.take::<ToGuest>().unwrap() {
                    got.push(message);
                }
            }
            assert_eq!(got, sent, "in pieces of {size}");
        }
    }

    #[test]
    fn an_excessive_length_is_rejected_early() {
        let mut reader = Reader::default();
        reader.push(&u32::MAX.to_le_bytes());
        assert_eq!(reader.take::<ToHost>(), Err(Malformed::TooLong(u32::MAX as usize)));
        let long = ToHost::Failed { code: 1, message: "x".repeat(ToHost::MAX_BYTES) };
        let mut out = Vec::new();
        assert!(matches!(write(&long, &mut out), Err(Malformed::TooLong(_))));
        assert!(out.is_empty());
    }

    #[test]
    fn an_invalid_message_is_rejected() {
        for bytes in [&[1, 0, 0, 0, 99][..], &[3, 0, 0, 0, 3, 0, 0], &[0, 0, 0, 0]] {
            let mut reader = Reader::default();
            reader.push(bytes);
            assert_eq!(reader.take::<ToGuest>(), Err(Malformed::Content), "{bytes:?}");
        }
    }

    #[test]
    fn a_length_within_a_message_does_not_allocate_beyond_it() {
        // Found by fuzzing: a message that claims to be 2^28 bytes long.
        let mut reader = Reader::default();
        reader.push(&[7, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0x7f, b'a', 0]);
        assert_eq!(reader.take::<ToHost>(), Err(Malformed::Content));
    }
}
