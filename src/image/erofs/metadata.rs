//! Writes inodes and directories of the complete tree: each inode is first assigned its location, to which directories
//! refer; then full directory blocks are written, and the inodes with their inline data.
//!
//! Only locations are kept in memory, regardless of the number of files; data is written as it is generated.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::content::{Content, Data, Place};
use super::dirent::{self, Dirent};
use super::inode::{self, DataLayout};
use super::{BLOCK_BYTES, compress};
use crate::image::tree::{Body, Node, NodeId, ROOT, Tree};

/// The unit of inode numbers, relative to the start of the metadata.
const SLOT_BYTES: u64 = 32;
/// The number of partially filled blocks considered for an inode.
const OPEN_BLOCKS: usize = 8;

/// The locations of the parts of the metadata.
pub struct Metadata {
    pub root_nid: u16,
    pub inodes: u64,
    pub meta_block: u32,
    /// The first block after everything.
    pub end_block: u32,
}

/// Writes everything except file contents.
pub fn write(data: &mut Data, tree: &Tree) -> Result<Metadata> {
    data.pad()?;
    let plan = Plan::of(tree)?;
    let first_block = data.next_block()?;
    let meta_block = first_block.checked_add(plan.directory_blocks).context("too many directories")?;
    let meta_blocks = u32::try_from(plan.room.blocks).context("too many files")?;
    let end_block = meta_block.checked_add(meta_blocks).context("too many files")?;
    let file = data.file().try_clone()?;
    let mut window = Window { file, start: u64::from(meta_block) * BLOCK_BYTES as u64, bytes: Vec::new() };
    let meta_start = window.start;
    let mut bytes = Vec::new();
    for &id in &plan.order {
        let (node, spot) = (plan.node(tree, id)?, plan.spot(id)?);
        bytes.clear();
        encode(data, tree, &plan, id, &mut bytes).with_context(|| format!("inode {}", spot.number))?;
        debug_assert_eq!(bytes.len() as u64, Shape::of(node).total_bytes(node));
        window.write(meta_start + spot.at, &bytes)?;
    }
    window.flush(0)?;
    data.pad()?;
    data.flush()?;
    let root_nid = u16::try_from(plan.spot(ROOT)?.at / SLOT_BYTES).context("the root is not among the first inodes")?;
    Ok(Metadata { root_nid, inodes: plan.order.len() as u64, meta_block, end_block })
}

/// Appends an inode and its inline data; full directory blocks go to `data`.
fn encode(data: &mut Data, tree: &Tree, plan: &Plan, id: NodeId, output: &mut Vec<u8>) -> Result<()> {
    let (node, spot) = (plan.node(tree, id)?, plan.spot(id)?);
    let shape = Shape::of(node);
    let (mut union, mut links, mut behind) = (0, node.names, Vec::new());
    match &node.body {
        Body::Directory(children) => {
            links = 2;
            let entry = |name, id| -> Result<Dirent> {
                let kind = inode::kind(&plan.node(tree, id)?.body);
                Ok(Dirent { name, nid: plan.spot(id)?.at / SLOT_BYTES, kind })
            };
            let mut entries = Vec::with_capacity(children.len());
            for (name, &child) in children {
                links += u32::from(matches!(plan.node(tree, child)?.body, Body::Directory(_)));
                entries.push(entry(name, child)?);
            }
            let (dot, dots) = (entry(b".", id)?, entry(b"..", spot.parent)?);
            let entries = dirent::sorted(entries.into_iter(), |entry| entry.name, dot, dots);
            dirent::encode(&entries, &mut behind);
            union = put_blocks(data, &shape, &mut behind)?;
        }
        Body::Symlink(target) => {
            behind.extend_from_slice(target);
            union = put_blocks(data, &shape, &mut behind)?;
        }
        Body::File(content) => union = content_behind(data, content, &shape, &mut behind)?,
        Body::Character { major, minor } | Body::Block { major, minor } => {
            union = inode::device_number(*major, *minor);
        }
        Body::Fifo | Body::Socket => {}
    }
    let place = inode::Place { layout: shape.layout, size_bytes: shape.size_bytes, union, number: spot.number, links };
    inode::encode(node, &place, output);
    if shape.is_table {
        output.resize(output.len().next_multiple_of(8), 0);
    }
    output.extend_from_slice(&behind);
    Ok(())
}

/// Moves all full blocks to `data`, and returns the number of the first.
fn put_blocks(data: &mut Data, shape: &Shape, bytes: &mut Vec<u8>) -> Result<u32> {
    let block = data.next_block()?;
    let len = (shape.blocks as usize * BLOCK_BYTES).min(bytes.len());
    data.append(&bytes[..len])?;
    data.pad()?;
    bytes.drain(..len);
    Ok(block)
}

/// Appends the data after a file's inode, and returns its `i_u`.
fn content_behind(data: &mut Data, content: &Content, shape: &Shape, output: &mut Vec<u8>) -> Result<u32> {
    match &content.place {
        Place::Flat { block, tail } => {
            if let Some(at) = tail {
                output.resize(shape.behind_bytes as usize, 0);
                data.read_spilled(*at, output)?;
            }
            Ok(*block)
        }
        Place::Packed(clusters) => {
            compress::encode_table(content, clusters, output);
            Ok(compress::blocks(clusters))
        }
        Place::Sparse(map) => {
            output.extend(map.iter().flat_map(|block| block.to_le_bytes()));
            // Chunks of one block, addressed by a 32-bit number.
            Ok(0)
        }
    }
}

/// The layout of a file's data, before locations are assigned.
struct Shape {
    layout: DataLayout,
    size_bytes: u64,
    /// The size of the data after the inode and its attributes.
    behind_bytes: u64,
    /// Whether that is a table, which is 8-byte aligned and may cross blocks.
    is_table: bool,
    /// The number of blocks written before the inodes.
    blocks: u32,
}

impl Shape {
    fn of(node: &Node) -> Shape {
        let plain = |size_bytes, blocks| Shape {
            layout: DataLayout::Plain,
            size_bytes,
            behind_bytes: 0,
            is_table: false,
            blocks,
        };
        let inline = |size_bytes, behind_bytes, blocks| Shape {
            layout: DataLayout::Inline,
            behind_bytes,
            ..plain(size_bytes, blocks)
        };
        let room = BLOCK_BYTES.saturating_sub(inode::head_bytes(&node.attributes));
        match &node.body {
            Body::Directory(children) => {
                let shape = dirent::shape(children.keys().map(|name| &**name));
                match shape.last_bytes {
                    last if last <= room => inline(shape.size_bytes(), last as u64, shape.full_blocks),
                    _ => plain(shape.size_bytes(), shape.full_blocks + 1),
                }
            }
            Body::Symlink(target) if target.len() <= room => inline(target.len() as u64, target.len() as u64, 0),
            Body::Symlink(target) => plain(target.len() as u64, 1),
            Body::File(content) => {
                let size_bytes = content.size_bytes;
                let table =
                    |layout, behind_bytes| Shape { layout, behind_bytes, is_table: true, ..plain(size_bytes, 0) };
                match &content.place {
                    Place::Flat { tail: Some(_), .. } => inline(size_bytes, size_bytes % BLOCK_BYTES as u64, 0),
                    Place::Flat { tail: None, .. } => plain(size_bytes, 0),
                    Place::Packed(_) => table(DataLayout::Compressed, compress::table_bytes(size_bytes)),
                    Place::Sparse(map) => Shape { is_table: false, ..table(DataLayout::Chunks, 4 * map.len() as u64) },
                }
            }
            _ => plain(0, 0),
        }
    }

    /// The total size of the inode with everything after it.
    fn total_bytes(&self, node: &Node) -> u64 {
        let head_bytes = inode::head_bytes(&node.attributes) as u64;
        (if self.is_table { head_bytes.next_multiple_of(8) } else { head_bytes }) + self.behind_bytes
    }
}

/// The location of an inode.
#[derive(Debug, Clone, Copy)]
struct Spot {
    /// The offset from the start of the metadata.
    at: u64,
    number: u32,
    parent: NodeId,
}

/// The location of every inode, in the order they are written: files grouped by directory.
struct Plan {
    spots: Vec<Option<Spot>>,
    order: Vec<NodeId>,
    room: Room,
    directory_blocks: u32,
}

impl Plan {
    fn of(tree: &Tree) -> Result<Plan> {
        let mut plan =
            Plan { spots: vec![None; tree.places()], order: Vec::new(), room: Room::new(), directory_blocks: 0 };
        plan.place(tree, ROOT, ROOT)?;
        let mut directories = vec![ROOT];
        while let Some(parent) = directories.pop() {
            let Body::Directory(children) = &plan.node(tree, parent)?.body else { continue };
            for &child in children.values() {
                if plan.spots.get(child).is_some_and(Option::is_none) {
                    plan.place(tree, child, parent)?;
                    directories.push(child);
                }
            }
        }
        Ok(plan)
    }

    fn place(&mut self, tree: &Tree, id: NodeId, parent: NodeId) -> Result<()> {
        let node = self.node(tree, id)?;
        let shape = Shape::of(node);
        let number = u32::try_from(self.order.len() + 1).context("too many files")?;
        let at = self.room.take(shape.total_bytes(node));
        self.directory_blocks = self.directory_blocks.checked_add(shape.blocks).context("too many directories")?;
        *self.spots.get_mut(id).context("no such file")? = Some(Spot { at, number, parent });
        self.order.push(id);
        Ok(())
    }

    fn node<'a>(&self, tree: &'a Tree, id: NodeId) -> Result<&'a Node> {
        tree.node(id).context("no such file")
    }

    fn spot(&self, id: NodeId) -> Result<Spot> {
        self.spots.get(id).copied().flatten().context("no such file")
    }
}

/// The allocator of metadata blocks.
struct Room {
    blocks: u64,
    /// The offsets of free space in partially filled blocks.
    open: Vec<u64>,
}

impl Room {
    fn new() -> Room {
        // Offset zero is unused: some programs treat inode 0 as a removed file.
        Room { blocks: 1, open: vec![SLOT_BYTES] }
    }

    /// Allocates space that does not cross a block boundary if it fits into a block.
    fn take(&mut self, bytes: u64) -> u64 {
        const BLOCK: u64 = BLOCK_BYTES as u64;
        let fits = |at: u64| at % BLOCK + bytes <= BLOCK;
        let at = match self.open.iter().position(|&at| fits(at)) {
            Some(index) => self.open.remove(index),
            None => {
                let at = self.blocks * BLOCK;
                self.blocks += bytes.div_ceil(BLOCK);
                at
            }
        };
        let rest = (at + bytes).next_multiple_of(SLOT_BYTES);
        if !rest.is_multiple_of(BLOCK) {
            self.open.push(rest);
            if self.open.len() > OPEN_BLOCKS {
                // The oldest one, which is nearly full.
                self.open.remove(0);
            }
        }
        at
    }
}

/// The last part of the image, written in nearly ascending order.
struct Window {
    file: File,
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    const MAX_BYTES: usize = 1 << 20;
    /// The amount kept when the rest is written: most of the blocks that still have room.
    const KEPT_BYTES: usize = 128 << 10;

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(from) = at.checked_sub(self.start) else { return self.file.write_all_at(bytes, at) };
        let (from, end) = (from as usize, from as usize + bytes.len());
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[from..end].copy_from_slice(bytes);
        if self.bytes.len() > Self::MAX_BYTES { self.flush(Self::KEPT_BYTES) } else { Ok(()) }
    }

    /// Writes everything except the last `kept_bytes`.
    fn flush(&mut self, kept_bytes: usize) -> io::Result<()> {
        let len = self.bytes.len() - kept_bytes;
        self.file.write_all_at(&self.bytes[..len], self.start)?;
        self.bytes.drain(..len);
        self.start += len as u64;
        Ok(())
    }
}
