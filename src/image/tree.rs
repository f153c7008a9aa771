//! Merges the entries of layers, in order, into a tree in memory: names, attributes, and the location of contents.
//!
//! The tree contains only names and never refers to host paths, so neither names nor symbolic links can escape it.

mod node;

use std::borrow::Cow;
use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};

use super::erofs::{self, Content};
pub use node::{Attributes, Body, Node, NodeId, ROOT, Xattr};

/// The maximum length of a file name (EROFS, and Linux file systems in general).
const MAX_NAME_BYTES: usize = 255;
/// The maximum length of a path and of a symbolic link's target in Linux, without the NUL.
const MAX_PATH_BYTES: usize = 4095;
/// The maximum number of path components, including those of links: far more than the kernel follows.
const MAX_STEPS: usize = 4096;
/// Twelve bits of major number and twenty of minor number, the kernel's on-disk format (`new_encode_dev`).
const DEVICE_BITS: (u32, u32) = (12, 20);

/// Limits of a tree's memory usage, which a crafted archive must not exceed.
#[derive(Debug, Clone, Copy)]
pub struct TreeLimits {
    pub entries: u64,
    pub memory_bytes: u64,
}

impl Default for TreeLimits {
    fn default() -> TreeLimits {
        // Ten times a full desktop distribution.
        TreeLimits { entries: 4_000_000, memory_bytes: 1 << 30 }
    }
}

/// The result of resolving a path.
struct Way<'a> {
    /// The directories along the path, the root first.
    directories: Vec<NodeId>,
    /// The first component that is missing or not a directory, and the rest.
    missing: Vec<Cow<'a, [u8]>>,
}

impl Way<'_> {
    /// Goes to the parent directory. The root's parent is the root.
    fn leave(&mut self) {
        if self.missing.pop().is_none() && self.directories.len() > 1 {
            self.directories.pop();
        }
    }
}

/// The merged tree.
pub struct Tree {
    nodes: Vec<Node>,
    limits: TreeLimits,
    memory_bytes: u64,
    /// Contents that are no longer linked.
    forgotten: Vec<Content>,
    /// The layer of each entry: whiteouts hide entries of lower layers.
    layers: Vec<u32>,
    layer: u32,
    /// Directories in which the current layer has already hidden all lower entries, so that repeated whiteouts are
    /// cheap.
    hidden: HashSet<NodeId>,
}

impl Tree {
    /// Creates a tree with an empty root directory.
    pub fn new(limits: TreeLimits) -> Tree {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let root = Node { attributes, body: Body::empty_directory(), names: 1 };
        Tree {
            nodes: vec![root],
            limits,
            memory_bytes: 0,
            forgotten: Vec::new(),
            layers: vec![0],
            layer: 0,
            hidden: HashSet::new(),
        }
    }

    /// Starts the next layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.hidden.clear();
    }

    /// The node with this index, which must be from this tree.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    /// The number of indexes, including those of removed files.
    pub fn places(&self) -> usize {
        self.nodes.len()
    }

    /// Returns contents that are no longer part of the tree, each once.
    pub fn take_forgotten(&mut self) -> Vec<Content> {
        std::mem::take(&mut self.forgotten)
    }

    /// Inserts a file at `path`, replacing an existing one. A directory over a directory only changes its attributes.
    pub fn insert(&mut self, path: &[u8], attributes: Attributes, body: Body) -> Result<()> {
        if let Body::Symlink(target) = &body {
            ensure!(!target.is_empty() && !target.contains(&0), "a symbolic link has an empty target");
            ensure!(target.len() <= MAX_PATH_BYTES, "a symbolic link of {} bytes is too long", target.len());
        }
        if let Body::Character { major, minor } | Body::Block { major, minor } = body {
            let there_is = major >> DEVICE_BITS.0 == 0 && minor >> DEVICE_BITS.1 == 0;
            ensure!(there_is, "a device has an invalid number {major}:{minor}");
        }
        ensure!(erofs::xattrs_fit(&attributes.xattrs), "its extended attributes are too large");
        let names = components(path)?;
        let Some((name, parents)) = names.split_last() else {
            ensure!(matches!(body, Body::Directory(_)), "the root is not a directory");
            self.charge(&attributes, &body)?;
            return self.set_attributes(ROOT, attributes);
        };
        let parent = self.directory(parents)?;
        self.charge(&attributes, &body)?;
        if matches!(body, Body::Directory(_))
            && let Some(id) = self.child(parent, name)
            && self.is_directory(id)
        {
            return self.set_attributes(id, attributes);
        }
        let id = self.add(Node { attributes, body, names: 0 });
        self.enter(parent, name, id)
    }

    /// Creates a hard link to the file at `target`.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let (names, target_names) = (components(path)?, components(target)?);
        let id = self.find(&target_names)?.context("a hard link to a file that does not exist")?;
        ensure!(!self.is_directory(id), "a hard link to a directory");
        let (name, parents) = names.split_last().context("the root is a hard link")?;
        let parent = self.directory(parents)?;
        // Creating the parents may have replaced the target.
        ensure!(self.find(&target_names)? == Some(id), "a hard link to the file that it replaces");
        if self.child(parent, name) == Some(id) {
            return Ok(());
        }
        self.charge(&Attributes::default(), &Body::Fifo)?;
        self.enter(parent, name, id)
    }

    /// Removes entries of lower layers at `path`; those of the current layer stay.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let names = components(path)?;
        let (name, parents) = names.split_last().context("a whiteout of the root")?;
        let Some(parent) = self.find_directory(parents)? else { return Ok(()) };
        match self.child(parent, name) {
            Some(id) if self.is_from_this_layer(id) => self.remove_lower(id),
            Some(_) => self.leave(parent, name),
            None => Ok(()),
        }
    }

    /// Removes the lower layers' contents of the directory at `path`.
    pub fn whiteout_content(&mut self, path: &[u8]) -> Result<()> {
        match self.find_directory(&components(path)?)? {
            Some(id) => self.remove_lower(id),
            None => Ok(()),
        }
    }

    fn is_from_this_layer(&self, id: NodeId) -> bool {
        self.layers.get(id) == Some(&self.layer)
    }

    /// Removes entries of lower layers below a directory, and keeps the current layer's.
    fn remove_lower(&mut self, id: NodeId) -> Result<()> {
        let mut directories = vec![id];
        while let Some(id) = directories.pop() {
            if !self.hidden.insert(id) {
                continue;
            }
            let Some(Body::Directory(entries)) = self.nodes.get(id).map(|node| &node.body) else { continue };
            let entries: Vec<(Box<[u8]>, NodeId)> = entries.iter().map(|(name, &id)| (name.clone(), id)).collect();
            for (name, child) in entries {
                if self.is_from_this_layer(child) {
                    directories.push(child);
                } else {
                    self.leave(id, &name)?;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.layers.push(self.layer);
        self.nodes.len() - 1
    }

    /// Charges an entry to the limits, even if it is replaced later, since it took work.
    fn charge(&mut self, attributes: &Attributes, body: &Body) -> Result<()> {
        const NODE_BYTES: usize = 2 * size_of::<Node>();
        let xattrs: usize = attributes.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 64).sum();
        let body = match body {
            Body::Symlink(target) => target.len(),
            Body::File(content) => content.memory_bytes(),
            _ => 0,
        };
        self.memory_bytes += (NODE_BYTES + MAX_NAME_BYTES / 4 + xattrs + body) as u64;
        ensure!(
            self.nodes.len() as u64 <= self.limits.entries && self.memory_bytes <= self.limits.memory_bytes,
            "too many files: {} entries, {} MiB of names and attributes",
            self.nodes.len(),
            self.memory_bytes >> 20
        );
        Ok(())
    }

    fn set_attributes(&mut self, id: NodeId, attributes: Attributes) -> Result<()> {
        self.nodes.get_mut(id).context("no such file")?.attributes = attributes;
        *self.layers.get_mut(id).context("no such file")? = self.layer;
        Ok(())
    }

    fn is_directory(&self, id: NodeId) -> bool {
        self.nodes.get(id).is_some_and(|node| matches!(node.body, Body::Directory(_)))
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.nodes.get(parent)?.body {
            Body::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// The directory at `names`, if it exists.
    fn find_directory(&self, names: &[&[u8]]) -> Result<Option<NodeId>> {
        let Way { directories, missing } = self.way(names)?;
        Ok(directories.last().copied().filter(|_| missing.is_empty()))
    }

    fn find(&self, names: &[&[u8]]) -> Result<Option<NodeId>> {
        let Some((name, parents)) = names.split_last() else { return Ok(Some(ROOT)) };
        Ok(self.find_directory(parents)?.and_then(|parent| self.child(parent, name)))
    }

    /// The directory at `names`: missing components are created, and others replaced.
    fn directory(&mut self, names: &[&[u8]]) -> Result<NodeId> {
        let Way { directories, missing } = self.way(names)?;
        for &id in directories.iter().skip(1) {
            // It contains an entry of this layer, so a whiteout of this layer does not apply to it.
            *self.layers.get_mut(id).context("no such file")? = self.layer;
        }
        let mut id = directories.last().copied().unwrap_or(ROOT);
        for name in missing {
            let attributes = Attributes { mode: 0o755, ..Attributes::default() };
            self.charge(&attributes, &Body::Fifo)?;
            let child = self.add(Node { attributes, body: Body::empty_directory(), names: 0 });
            self.enter(id, &name, child)?;
            id = child;
        }
        Ok(id)
    }

    /// Resolves the directory `names` as far as it exists. Links along the way are followed, as when unpacking into a
    /// root file system and as in the kernel; they cannot leave the root.
    fn way<'a>(&self, names: &[&'a [u8]]) -> Result<Way<'a>> {
        let mut way = Way { directories: vec![ROOT], missing: Vec::new() };
        let mut left: Vec<Cow<[u8]>> = names.iter().rev().map(|&name| Cow::Borrowed(name)).collect();
        let mut steps = 0;
        while let Some(name) = left.pop() {
            steps += 1;
            ensure!(steps + left.len() <= MAX_STEPS, "a path has too many symbolic links");
            if *name == *b".." {
                way.leave();
                continue;
            }
            let here = way.directories.last().copied().filter(|_| way.missing.is_empty());
            let child = here.and_then(|here| self.child(here, &name));
            match child.and_then(|id| Some((id, &self.nodes.get(id)?.body))) {
                Some((id, Body::Directory(_))) => way.directories.push(id),
                Some((_, Body::Symlink(target))) => {
                    if target.starts_with(b"/") {
                        way.directories.truncate(1);
                    }
                    let names = target.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
                    left.extend(names.rev().map(|name| Cow::Owned(name.to_vec())));
                }
                _ => way.missing.push(name),
            }
        }
        Ok(way)
    }

    /// Adds a name to a directory, replacing an existing one.
    fn enter(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<()> {
        self.nodes.get_mut(id).context("no such file")?.names += 1;
        let Some(Body::Directory(entries)) = self.nodes.get_mut(parent).map(|node| &mut node.body) else {
            bail!("not a directory");
        };
        match entries.insert(name.into(), id) {
            Some(replaced) => self.release(replaced),
            None => Ok(()),
        }
    }

    /// Removes a name from a directory.
    fn leave(&mut self, parent: NodeId, name: &[u8]) -> Result<()> {
        let Some(Body::Directory(entries)) = self.nodes.get_mut(parent).map(|node| &mut node.body) else {
            return Ok(());
        };
        match entries.remove(name) {
            Some(removed) => self.release(removed),
            None => Ok(()),
        }
    }

    /// Removes a link to a file; with the last one, the file and everything below it is removed.
    fn release(&mut self, id: NodeId) -> Result<()> {
        let mut released = vec![id];
        while let Some(id) = released.pop() {
            let node = self.nodes.get_mut(id).context("no such file")?;
            node.names = node.names.saturating_sub(1);
            if node.names > 0 {
                continue;
            }
            match std::mem::replace(&mut node.body, Body::Fifo) {
                Body::Directory(entries) => released.extend(entries.into_values()),
                Body::File(content) => self.forgotten.push(content),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Splits a path into components. As in tar, a leading `/` and `.` are ignored. As in Docker, `..` removes the
/// preceding component lexically; a path that leaves the root is rejected.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    ensure!(path.len() <= MAX_PATH_BYTES, "a path of {} bytes is too long", path.len());
    let mut names = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        ensure!(name.len() <= MAX_NAME_BYTES, "a name of {} bytes is too long", name.len());
        ensure!(!name.contains(&0), "a name contains a NUL byte");
        match name {
            b"" | b"." => {}
            b".." => {
                let is_inside = names.pop().is_some() || path.starts_with(b"/");
                ensure!(is_inside, "a path leads out of the root directory");
            }
            name => names.push(name),
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::new(TreeLimits::default());
        tree.begin_layer();
        tree
    }

    fn put(tree: &mut Tree, path: &str) {
        let body = if path.ends_with('/') { Body::empty_directory() } else { Body::Fifo };
        tree.insert(path.as_bytes(), Attributes::default(), body).unwrap();
    }

    /// All paths, sorted.
    fn paths(tree: &Tree) -> Vec<String> {
        let (mut found, mut left) = (Vec::new(), vec![(String::new(), ROOT)]);
        while let Some((path, id)) = left.pop() {
            if let Body::Directory(entries) = &tree.node(id).unwrap().body {
                let name = |name: &[u8]| format!("{path}/{}", String::from_utf8_lossy(name));
                left.extend(entries.iter().map(|(entry, &id)| (name(entry), id)));
            }
            found.push(path);
        }
        found.sort();
        found.split_off(1)
    }

    #[test]
    fn a_whiteout_hides_lower_layers_in_any_order() {
        for whiteout_first in [true, false] {
            let mut tree = tree();
            for path in ["a/", "a/old", "a/sub/old", "b"] {
                put(&mut tree, path);
            }
            tree.begin_layer();
            if whiteout_first {
                tree.whiteout(b"a").unwrap();
            }
            put(&mut tree, "a/sub/new");
            if !whiteout_first {
                tree.whiteout(b"a").unwrap();
            }
            assert_eq!(paths(&tree), ["/a", "/a/sub", "/a/sub/new", "/b"], "{whiteout_first}");
            tree.begin_layer();
            tree.whiteout_content(b"a").unwrap();
            put(&mut tree, "a/x");
            tree.whiteout_content(b"a").unwrap();
            assert_eq!(paths(&tree), ["/a", "/a/x", "/b"]);
        }
    }

    fn link(tree: &mut Tree, path: &str, target: &str) {
        tree.insert(path.as_bytes(), Attributes::default(), Body::Symlink(target.as_bytes().into())).unwrap();
    }

    #[test]
    fn links_in_a_path_are_followed_within_the_root() {
        for target in ["usr/lib", "/usr/lib", "/../usr/./lib", "../../usr/lib", "d/../usr/lib", "other"] {
            let mut tree = tree();
            put(&mut tree, "usr/lib/old");
            put(&mut tree, "d/");
            link(&mut tree, "other", "usr//lib/");
            link(&mut tree, "lib", target);
            tree.begin_layer();
            put(&mut tree, "lib/new");
            tree.link(b"lib/hard", b"lib/new").unwrap();
            tree.whiteout(b"lib/old").unwrap();
            let expected = ["/d", "/lib", "/other", "/usr", "/usr/lib", "/usr/lib/hard", "/usr/lib/new"];
            assert_eq!(paths(&tree), expected, "{target}");
            // The entry replaces the link itself.
            put(&mut tree, "lib/");
            put(&mut tree, "lib/x");
            assert!(paths(&tree).contains(&"/lib/x".to_owned()), "{target}");
        }
    }

    #[test]
    fn the_target_of_a_dangling_link_is_created() {
        let mut tree = tree();
        link(&mut tree, "a/run", "../var/run");
        put(&mut tree, "a/run/x/y");
        assert_eq!(paths(&tree), ["/a", "/a/run", "/var", "/var/run", "/var/run/x", "/var/run/x/y"]);
        put(&mut tree, "file");
        link(&mut tree, "to-file", "file");
        put(&mut tree, "to-file/x");
        assert!(paths(&tree).contains(&"/file/x".to_owned()), "a file in the way gives way");
    }

    #[test]
    fn link_loops_are_rejected() {
        let mut tree = tree();
        link(&mut tree, "a", "b");
        link(&mut tree, "b", "a/x");
        let insert = |tree: &mut Tree, path: &[u8]| tree.insert(path, Attributes::default(), Body::Fifo);
        assert!(insert(&mut tree, b"a/y").unwrap_err().to_string().contains("too many symbolic links"));
        assert!(tree.link(b"z", b"a/y").is_err() && tree.whiteout(b"a/y").is_err());
        // Each doubles the number of entries to remove.
        for n in 0..40 {
            link(&mut tree, &format!("l{}", n + 1), &format!("l{n}/../l{n}"));
        }
        assert!(insert(&mut tree, b"l40/y").is_err());
    }

    #[test]
    fn a_content_is_released_with_its_last_link() {
        let mut tree = tree();
        let content = erofs::Content::nothing();
        tree.insert(b"d/a", Attributes::default(), Body::File(content.clone())).unwrap();
        tree.link(b"b", b"d/a").unwrap();
        put(&mut tree, "d/a");
        assert!(tree.take_forgotten().is_empty());
        tree.begin_layer();
        tree.whiteout(b"b").unwrap();
        assert_eq!(tree.take_forgotten(), [content]);
    }

    #[test]
    fn a_hard_link_that_would_replace_its_own_target_is_rejected() {
        let mut tree = tree();
        put(&mut tree, "a");
        assert!(tree.link(b"a/b", b"a").is_err());
    }

    #[test]
    fn paths_are_normalized_like_dockers() {
        for (path, expected) in [
            ("a/../b", "b"),
            ("./a//b/./../c/", "a/c"),
            ("a/..", ""),
            ("a/b/../../c", "c"),
            ("/../a", "a"),
            ("..a/...", "..a/..."),
        ] {
            assert_eq!(components(path.as_bytes()).unwrap().join(&b'/'), expected.as_bytes(), "{path}");
        }
        for path in ["..", "../a", "a/../../b", "./..", "a/../.."] {
            assert!(components(path.as_bytes()).is_err(), "{path}");
        }
    }

    #[test]
    fn a_tree_has_limits() {
        let mut tree = Tree::new(TreeLimits { entries: 100, memory_bytes: 1 << 20 });
        let deep = "x/".repeat(101);
        assert!(tree.insert(deep.as_bytes(), Attributes::default(), Body::empty_directory()).is_err());
        let mut tree = Tree::new(TreeLimits { entries: 1 << 30, memory_bytes: 100_000 });
        assert!((0..1000).any(|i| tree.insert(format!("{i}").as_bytes(), Attributes::default(), Body::Fifo).is_err()));
    }
}
