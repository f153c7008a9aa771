//! Extracts the kernel, the initramfs and the command line from a unified kernel image (UKI).
//!
//! A UKI is a PE file for UEFI with its parts in sections (UAPI Group, Unified Kernel Image; Microsoft, PE format). Its
//! program is not run. The file is untrusted: each section is validated to be within the file, and the section table is
//! limited.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};

use super::part::Part;

/// The offset of the PE header's offset in a DOS header.
const PE_OFFSET_AT: usize = 0x3c;
const DOS_HEADER_BYTES: usize = 0x40;
/// Signature and COFF file header.
const PE_HEADER_BYTES: usize = 24;
const SECTION_HEADER_BYTES: usize = 40;
/// IMAGE_FILE_MACHINE_AMD64.
const MACHINE_X86_64: u16 = 0x8664;
/// An image has about ten sections, and a few more for each profile.
const SECTIONS_MAX: usize = 512;
/// Longer than any kernel's limit, which is checked when it is loaded.
const CMDLINE_MAX_BYTES: u64 = 16 << 10;

/// The parts of a unified kernel image that a machine uses.
#[derive(Debug)]
pub struct Unified {
    /// `.linux`: a bzImage.
    pub linux: Part,
    /// `.initrd`.
    pub initrd: Option<Part>,
    /// `.cmdline`, joined to one line; may be empty.
    pub cmdline: String,
}

/// The relevant fields of a section header.
struct Section {
    name: [u8; 8],
    offset: u64,
    len_bytes: u64,
}

impl Unified {
    /// The parts of `file`, or `None` if it is not a unified kernel image. With several profiles, the first one is
    /// used, as is the default at boot.
    pub fn parse(file: &File) -> Result<Option<Unified>> {
        let Some(sections) = sections(file)? else { return Ok(None) };
        let find = |name: &[u8]| {
            // A profile's sections follow the common ones, and override them.
            let profiles = sections.iter().enumerate().filter(|(_, section)| section.is(b".profile"));
            let end = profiles.map(|(index, _)| index).nth(1).unwrap_or(sections.len());
            sections.iter().take(end).rfind(|section| section.is(name))
        };
        let Some(linux) = find(b".linux") else { return Ok(None) };
        let part = |section: &Section| {
            Part::of(file, section.offset, section.len_bytes).with_context(|| {
                let name = String::from_utf8_lossy(&section.name).trim_end_matches('\0').to_owned();
                format!("the unified kernel image is truncated: {name} is incomplete")
            })
        };
        Ok(Some(Unified {
            linux: part(linux)?,
            initrd: find(b".initrd").map(part).transpose()?.filter(|part| part.len_bytes() > 0),
            cmdline: find(b".cmdline").map(part).transpose()?.map_or(Ok(String::new()), |part| cmdline(&part))?,
        }))
    }
}

impl Section {
    fn parse(header: &[u8; SECTION_HEADER_BYTES]) -> Section {
        let word = |at: usize| {
            header.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
        };
        let mut name = [0; 8];
        name.copy_from_slice(&header[..8]);
        // The virtual size is the content's size; the raw size is rounded up.
        let (in_memory, in_file) = (word(8), word(16));
        let len = if in_memory == 0 { in_file } else { in_memory.min(in_file) };
        Section { name, offset: word(20).into(), len_bytes: len.into() }
    }

    fn is(&self, name: &[u8]) -> bool {
        self.name.strip_prefix(name).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
    }
}

/// The sections of a PE file for x86-64, in order; `None` for other files.
fn sections(file: &File) -> Result<Option<Vec<Section>>> {
    let mut dos = [0; DOS_HEADER_BYTES];
    let Some(()) = read_whole(file, &mut dos, 0)? else { return Ok(None) };
    let Some(pe_at) = dos.get(PE_OFFSET_AT..).and_then(|rest| rest.first_chunk()) else { return Ok(None) };
    let pe_at = u64::from(u32::from_le_bytes(*pe_at));
    let mut pe = [0; PE_HEADER_BYTES];
    let Some(()) = read_whole(file, &mut pe, pe_at)? else { return Ok(None) };
    let half = |at: usize| pe.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |half| u16::from_le_bytes(*half));
    let (machine, count, optional_bytes) = (half(4), usize::from(half(6)), half(20));
    if !dos.starts_with(b"MZ") || !pe.starts_with(b"PE\0\0") || machine != MACHINE_X86_64 {
        return Ok(None);
    }
    ensure!(count <= SECTIONS_MAX, "{count} sections are too many for a unified kernel image");
    let table_at = pe_at + PE_HEADER_BYTES as u64 + u64::from(optional_bytes);
    let mut sections = Vec::with_capacity(count);
    for index in 0..count {
        let mut header = [0; SECTION_HEADER_BYTES];
        let at = table_at + (index * SECTION_HEADER_BYTES) as u64;
        let Some(()) = read_whole(file, &mut header, at)? else {
            bail!("the PE file is truncated: its section table is incomplete")
        };
        sections.push(Section::parse(&header));
    }
    Ok(Some(sections))
}

/// Reads exactly `buffer` at `offset`. `None` if the file is shorter.
fn read_whole(file: &File, buffer: &mut [u8], offset: u64) -> Result<Option<()>> {
    match file.read_exact_at(buffer, offset) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error).context("read kernel"),
    }
}

/// The text of a `.cmdline` section as a single line: it ends with the section or a NUL, and often contains a newline.
fn cmdline(part: &Part) -> Result<String> {
    ensure!(
        part.len_bytes() <= CMDLINE_MAX_BYTES,
        "the .cmdline of the unified kernel image is too long: {} bytes",
        part.len_bytes()
    );
    let mut bytes = vec![0; usize::try_from(part.len_bytes())?];
    part.read_exact_at(&mut bytes, 0).context("read the .cmdline of the unified kernel image")?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = str::from_utf8(text).context("the .cmdline of the unified kernel image is not valid UTF-8")?;
    let line: String = text.chars().map(|c| if c.is_ascii_whitespace() { ' ' } else { c }).collect();
    Ok(line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::boot::sample;

    fn parse(bytes: &[u8]) -> Result<Option<Unified>> {
        Unified::parse(&sample::file(bytes))
    }

    fn content(part: &Part) -> Vec<u8> {
        let mut bytes = Vec::new();
        part.reader(0, u64::MAX).read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn kernel_initrd_and_command_line_are_extracted() {
        let image = sample::unified(&[
            (".osrel", b"ID=x"),
            (".cmdline", b"root=/dev/vda  quiet\n\0"),
            (".initrd", b"070701"),
            (".linux", b"kernel"),
        ]);
        let unified = parse(&image).unwrap().unwrap();
        assert_eq!(content(&unified.linux), b"kernel", "and nothing of what rounds it up");
        assert_eq!(content(&unified.initrd.unwrap()), b"070701");
        assert_eq!(unified.cmdline, "root=/dev/vda  quiet");
        let bare = parse(&sample::unified(&[(".linux", b"kernel"), (".initrd", b"")])).unwrap().unwrap();
        assert!(bare.initrd.is_none() && bare.cmdline.is_empty());
    }

    #[test]
    fn the_first_profile_is_the_one_that_boots() {
        let image = sample::unified(&[
            (".linux", b"kernel"),
            (".cmdline", b"of all"),
            (".profile", b"ID=first"),
            (".cmdline", b"first"),
            (".profile", b"ID=second"),
            (".cmdline", b"second"),
            (".initrd", b"second"),
        ]);
        let unified = parse(&image).unwrap().unwrap();
        assert_eq!((unified.cmdline.as_str(), unified.initrd.is_some()), ("first", false));
    }

    #[test]
    fn other_files_are_not_unified_images() {
        let image = sample::unified(&[(".linux", b"kernel")]);
        let mut arm = image.clone();
        sample::put(&mut arm, sample::PE_AT + 4, &0xaa64u16.to_le_bytes());
        let mut far = image.clone();
        sample::put(&mut far, PE_OFFSET_AT, &u32::MAX.to_le_bytes());
        for other in [b"".as_slice(), b"MZ", &[0; 4096], &arm, &far, &sample::unified(&[(".text", b"program")])] {
            assert!(parse(other).unwrap().is_none());
        }
    }

    #[test]
    fn every_truncation_is_rejected_or_not_recognized() {
        let whole = sample::unified(&[(".initrd", b"070701"), (".cmdline", b"quiet"), (".linux", b"kernel")]);
        parse(&whole).unwrap().unwrap();
        // The last section's content is followed only by padding.
        let content_end = whole.len() - sample::PE_ALIGNMENT + b"kernel".len();
        for len in 0..content_end {
            assert!(!matches!(parse(&whole[..len]), Ok(Some(_))), "{len} bytes");
        }
        parse(&whole[..content_end]).unwrap().unwrap();
    }

    #[test]
    fn invalid_sections_are_rejected() {
        let header_at = sample::PE_AT + PE_HEADER_BYTES;
        let lying = |at: usize, value: u32| {
            let mut image = sample::unified(&[(".linux", b"kernel")]);
            sample::put(&mut image, header_at + at, &value.to_le_bytes());
            if at == 8 {
                sample::put(&mut image, header_at + 16, &value.to_le_bytes());
            }
            format!("{:#}", parse(&image).unwrap_err())
        };
        for (at, value) in [(8, u32::MAX), (20, u32::MAX)] {
            assert!(lying(at, value).contains(".linux is incomplete"), "{at}");
        }
        let long = vec![b'a'; CMDLINE_MAX_BYTES as usize + 1];
        let error = parse(&sample::unified(&[(".linux", b"k"), (".cmdline", &long)])).unwrap_err();
        assert_eq!(error.to_string(), "the .cmdline of the unified kernel image is too long: 16385 bytes");
        assert!(parse(&sample::unified(&[(".linux", b"k"), (".cmdline", b"\xff\xfe")])).is_err());
        let mut many = sample::unified(&[(".linux", b"kernel")]);
        sample::put(&mut many, sample::PE_AT + 6, &u16::MAX.to_le_bytes());
        assert!(parse(&many).is_err());
    }
}
