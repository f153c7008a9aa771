//! The kernel of a guest, as far as the tests need it.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, RenameFlags, open};

use super::super::link::{Ends, Link, Message};
use super::super::wire::{ENTRY_BYTES, Fields, IN_HEADER_BYTES, opcode};
use super::super::worker::Worker;
use super::super::{Options, Server};

/// A guest of a server, which is a thread here.
pub struct Client {
    pub dir: tempfile::TempDir,
    pub link: Option<Link>,
    /// The user and the group who ask.
    pub user: (u32, u32),
    pub server: Option<Arc<Server>>,
    unique: u64,
    thread: Option<JoinHandle<()>>,
}

/// A reply with an entry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    pub id: u64,
    pub inode: u64,
    pub size: u64,
    pub mode: u32,
}

impl Client {
    pub fn new() -> Client {
        Client::with(Options::default(), 4096)
    }

    /// A guest of a server with `files_max` descriptors.
    pub fn with(options: Options, files_max: usize) -> Client {
        let dir = tempfile::tempdir().unwrap();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = open(dir.path(), flags, Mode::empty()).unwrap();
        let descriptors = open("/proc/self/fd", flags, Mode::empty()).unwrap();
        let (ours, theirs) = Ends::pair().unwrap();
        let is_root = rustix::process::geteuid().is_root();
        let server = Arc::new(Server::new(root, options, is_root, files_max).unwrap());
        let link = Arc::new(theirs.connect().unwrap());
        let shared = server.clone();
        let thread = std::thread::spawn(move || {
            let worker = Worker::new(shared, link, descriptors).unwrap();
            worker.run();
        });
        let mut client = Client::of(dir, ours.connect().unwrap());
        (client.server, client.thread) = (Some(server), Some(thread));
        client
    }

    /// A guest of the server at the other end of `link`, which serves `dir`.
    pub fn of(dir: tempfile::TempDir, link: Link) -> Client {
        Client { dir, link: Some(link), user: (0, 0), server: None, unique: 0, thread: None }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn request(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let mut bytes = Vec::new();
        bytes.extend(((IN_HEADER_BYTES + arguments.len()) as u32).to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        [self.user.0, self.user.1, 1, 0].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes.extend(arguments);
        bytes
    }

    /// Sends the bytes of a request and returns those of the reply.
    pub fn send(&mut self, request: &[u8], room_bytes: u32) -> Vec<u8> {
        let link = self.link.as_ref().unwrap();
        link.slot(0).unwrap().copy_from(request);
        link.send(Message { slot: 0, len_bytes: request.len() as u32, room_bytes }).unwrap();
        let reply = link.receive().unwrap();
        assert!(reply.len_bytes <= room_bytes, "{reply:?}");
        let mut bytes = vec![0; reply.len_bytes as usize];
        link.slot(0).unwrap().copy_to(&mut bytes);
        bytes
    }

    /// A request and its reply's body, or its error.
    pub fn call(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, i32> {
        let request = self.request(opcode, node, arguments);
        let reply = self.send(&request, 2 << 20);
        let mut fields = Fields(&reply);
        assert_eq!(fields.u32().unwrap() as usize, reply.len());
        let error = -(fields.u32().unwrap() as i32);
        assert_eq!(fields.u64().unwrap(), self.unique);
        if error == 0 { Ok(fields.0.to_vec()) } else { Err(error) }
    }

    /// A request without a reply.
    pub fn tell(&mut self, opcode: u32, node: u64, arguments: &[u8]) {
        let request = self.request(opcode, node, arguments);
        assert_eq!(self.send(&request, 0), b"");
    }

    pub fn init_fields(&self, features: u64) -> Vec<u8> {
        let mut bytes = fields32(&[7, 38, 1 << 17, features as u32, (features >> 32) as u32]);
        bytes.resize(64, 0);
        bytes
    }

    pub fn init(&mut self, features: u64) -> Result<Vec<u8>, i32> {
        let fields = self.init_fields(features);
        self.call(opcode::INIT, 0, &fields)
    }

    pub fn look_up(&mut self, folder: u64, name: &str) -> Result<Entry, i32> {
        self.call(opcode::LOOKUP, folder, &c_string(name)).map(|body| entry(&body))
    }

    pub fn mkdir(&mut self, folder: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        self.call(opcode::MKDIR, folder, &[fields32(&[mode, 0]), c_string(name)].concat()).map(|body| entry(&body))
    }

    pub fn mknod(&mut self, name: &str, mode: u32, mask: u32) -> Result<Entry, i32> {
        let arguments = [fields32(&[mode, 0, mask, 0]), c_string(name)].concat();
        self.call(opcode::MKNOD, 1, &arguments).map(|body| entry(&body))
    }

    pub fn create(&mut self, folder: u64, name: &str, flags: u32, mode: u32) -> Result<(Entry, u64), i32> {
        self.create_with(opcode::CREATE, folder, name, flags, mode)
    }

    pub fn create_with(
        &mut self,
        opcode: u32,
        folder: u64,
        name: &str,
        flags: u32,
        mode: u32,
    ) -> Result<(Entry, u64), i32> {
        let body = self.call(opcode, folder, &[fields32(&[flags, mode, 0, 0]), c_string(name)].concat())?;
        Ok((entry(&body), Fields(&body[ENTRY_BYTES..]).u64().unwrap()))
    }

    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        self.call(opcode::OPEN, node, &fields32(&[flags, 0])).map(|body| Fields(&body).u64().unwrap())
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut arguments = fields64(&[handle, offset]);
        arguments.extend(fields32(&[size, 0, 0, 0, 0, 0]));
        self.call(opcode::READ, node, &arguments)
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let mut arguments = fields64(&[handle, offset]);
        arguments.extend(fields32(&[data.len() as u32, flags, 0, 0, 0, 0]));
        arguments.extend(data);
        self.call(opcode::WRITE, node, &arguments).map(|body| Fields(&body).u32().unwrap())
    }

    pub fn seek(&mut self, node: u64, handle: u64, offset: u64, whence: i32) -> Result<u64, i32> {
        let arguments = [fields64(&[handle, offset]), fields32(&[whence as u32, 0])].concat();
        self.call(opcode::LSEEK, node, &arguments).map(|body| Fields(&body).u64().unwrap())
    }

    pub fn allocate(&mut self, node: u64, handle: u64, offset: u64, len: u64, mode: u32) -> Result<(), i32> {
        let arguments = [fields64(&[handle, offset, len]), fields32(&[mode, 0])].concat();
        self.call(opcode::FALLOCATE, node, &arguments).map(drop)
    }

    pub fn copy(&mut self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> Result<u32, i32> {
        let arguments = fields64(&[from.1, from.2, to.0, to.1, to.2, len, 0]);
        self.call(opcode::COPY_FILE_RANGE, from.0, &arguments).map(|body| Fields(&body).u32().unwrap())
    }

    pub fn rename(&mut self, from: u64, old: &str, to: u64, new: &str, flags: RenameFlags) -> Result<(), i32> {
        let arguments = [fields64(&[to]), fields32(&[flags.bits(), 0]), c_string(old), c_string(new)].concat();
        self.call(opcode::RENAME2, from, &arguments).map(drop)
    }

    pub fn set_attributes(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mtime: (u64, u32),
        mode: u32,
    ) -> Result<(), i32> {
        let arguments = [
            fields32(&[valid, 0]),
            fields64(&[0, size, 0, 0, mtime.0, 0]),
            fields32(&[0, mtime.1, 0, mode, 0, 0, 0, 0]),
        ];
        self.call(opcode::SETATTR, node, &arguments.concat()).map(drop)
    }

    pub fn set_owner(&mut self, node: u64, [uid, gid]: [u32; 2]) -> Result<(), i32> {
        let arguments = [fields32(&[6, 0]), fields64(&[0; 6]), fields32(&[0, 0, 0, 0, 0, uid, gid, 0])];
        self.call(opcode::SETATTR, node, &arguments.concat()).map(drop)
    }

    pub fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let arguments = [fields32(&[value.len() as u32, 0]), c_string(name), value.to_vec()].concat();
        self.call(opcode::SETXATTR, node, &arguments).map(drop)
    }

    pub fn get_xattr(&mut self, node: u64, name: &str, room: u32) -> Result<Vec<u8>, i32> {
        self.call(opcode::GETXATTR, node, &[fields32(&[room, 0]), c_string(name)].concat())
    }

    /// All names in a folder with their IDs, 0 for those that are not told.
    pub fn read_folder(&mut self, node: u64, with_attributes: bool) -> Vec<(String, u64)> {
        let body = self.call(opcode::OPENDIR, node, &[0; 8]).unwrap();
        let handle = Fields(&body).u64().unwrap();
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let arguments = [fields64(&[handle, offset]), fields32(&[4096, 0, 0, 0, 0, 0])].concat();
            let opcode = if with_attributes { opcode::READDIRPLUS } else { opcode::READDIR };
            let body = self.call(opcode, node, &arguments).unwrap();
            let mut fields = Fields(&body);
            if fields.0.is_empty() {
                break;
            }
            while !fields.0.is_empty() {
                let id = if with_attributes { Fields(fields.bytes(ENTRY_BYTES).unwrap()).u64().unwrap() } else { 0 };
                let _inode = fields.u64().unwrap();
                offset = fields.u64().unwrap();
                let (len, _kind) = (fields.u32().unwrap() as usize, fields.u32().unwrap());
                let name = fields.bytes(len.next_multiple_of(8)).unwrap();
                found.push((String::from_utf8(name[..len].to_vec()).unwrap(), id));
            }
        }
        self.call(opcode::RELEASEDIR, node, &[handle.to_le_bytes(), [0; 8], [0; 8]].concat()).unwrap();
        found
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.link = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

pub fn fields32(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

pub fn fields64(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

pub fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn entry(body: &[u8]) -> Entry {
    let mut fields = Fields(body);
    let id = fields.u64().unwrap();
    fields.bytes(32).unwrap();
    let (inode, size) = (fields.u64().unwrap(), fields.u64().unwrap());
    fields.bytes(44).unwrap();
    Entry { id, inode, size, mode: fields.u32().unwrap() }
}
