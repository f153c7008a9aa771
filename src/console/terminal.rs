//! The terminal that husk was started on: raw while a machine has it, and as it was on every way out.
#![allow(unsafe_code)]

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_protocol::WindowSize;
use vmm_sys_util::signal::register_signal_handler;

/// How the terminal was before; set once, so that a signal handler may read it.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);
/// What a fault in husk itself ends with.
const FATAL_SIGNALS: [i32; 5] = [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV];

/// A terminal made raw; dropping it, a panic, or a fatal signal restores it.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw if it is a terminal and husk is in its foreground: in both directions bytes pass as they are
    /// (cfmakeraw(3)), so that husk's own lines go through [`say`]. To be called once, before other threads are started.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        if !has_foreground_terminal() {
            return Ok(None);
        }
        let before = attributes()?;
        let mut raw = before;
        // SAFETY: `raw` is a whole termios, which cfmakeraw only changes in place.
        unsafe { libc::cfmakeraw(&mut raw) };
        // From here on whatever ends the process finds out how the terminal was.
        BEFORE.get_or_init(|| before);
        debug_assert!(!RAW.load(Ordering::Relaxed));
        restore_on_faults()?;
        RAW.store(true, Ordering::SeqCst);
        set_attributes(&raw)?;
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, if it is raw. Async-signal-safe, and harmless when repeated.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(before) = BEFORE.get()
    {
        // The terminal may be gone; then there is nothing to restore.
        let _ = set_attributes(before);
    }
}

/// Says `text`, which is whole lines, on standard error, unless there is no room for it within `timeout`: who says something
/// from where others wait for them is not to wait for a reader that sleeps. Returns whether it was said.
pub fn say(text: &str, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the call reads and writes the one structure that it is given.
    let has_room = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } > 0;
    if has_room {
        // There is no other place to say that it is closed, or on a full disk.
        let _ = io::stderr().write_all(on_screen(text).as_bytes());
    }
    has_room
}

/// `text` as standard error has to have it now: on a raw terminal a line feed alone does not return the carriage.
pub fn on_screen(text: &str) -> Cow<'_, str> {
    match RAW.load(Ordering::Relaxed) && io::stderr().is_terminal() {
        true => text.replace('\n', "\r\n").into(),
        false => text.into(),
    }
}

/// The size of the terminal that this process is on, if it is on one.
pub fn window_size() -> Option<WindowSize> {
    [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().find_map(|fd| {
        let mut size = MaybeUninit::<libc::winsize>::uninit();
        // SAFETY: the request writes a whole `winsize` when it returns 0, and only then it is read.
        let size = unsafe { (libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr()) == 0).then(|| size.assume_init()) }?;
        Some(WindowSize { rows: size.ws_row, columns: size.ws_col })
    })
}

fn has_foreground_terminal() -> bool {
    // SAFETY: these calls read the state of a descriptor and of this process, and touch no memory of ours.
    unsafe { libc::isatty(libc::STDIN_FILENO) == 1 && libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

fn attributes() -> io::Result<libc::termios> {
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: tcgetattr writes a whole termios to the pointer it is given when it returns 0, and only then it is read.
    unsafe {
        if libc::tcgetattr(libc::STDIN_FILENO, attributes.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(attributes.assume_init())
    }
}

fn set_attributes(attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: tcsetattr only reads the termios behind the reference.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn restore_on_faults() -> io::Result<()> {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        next(info);
    }));
    for signal in FATAL_SIGNALS {
        register_signal_handler(signal, on_fatal_signal)?;
    }
    Ok(())
}

/// Restores the terminal, then lets the signal do what it does by default.
extern "C" fn on_fatal_signal(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    // SAFETY: signal and raise are async-signal-safe and touch no memory of ours.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
