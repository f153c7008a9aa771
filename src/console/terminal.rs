//! The terminal that husk was started on: raw while a machine uses it, and restored on every exit path.
#![allow(unsafe_code)]

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_protocol::WindowSize;
use vmm_sys_util::signal::register_signal_handler;

/// The original settings; set once, so that a signal handler may read them.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);
/// Signals raised by faults in husk itself.
const FATAL_SIGNALS: [i32; 5] = [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV];

/// A terminal in raw mode; dropping it, a panic or a fatal signal restores it.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Switches standard input to raw mode if it is a terminal and husk is in the foreground: bytes pass unchanged in
    /// both directions (cfmakeraw(3)), so husk's own messages must be printed with [`say`]. Must be called once, before
    /// other threads are started.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        if !has_foreground_terminal() {
            return Ok(None);
        }
        let before = attributes()?;
        let mut raw = before;
        // SAFETY: `raw` is a valid termios, which cfmakeraw modifies in place.
        unsafe { libc::cfmakeraw(&mut raw) };
        // From here on every exit path finds the original settings.
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

/// Restores the terminal if it is raw. Async-signal-safe, and does nothing when repeated.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(before) = BEFORE.get()
    {
        // The terminal may be gone, in which case there is nothing to restore.
        let _ = set_attributes(before);
    }
}

/// Prints `text`, which consists of complete lines, to standard error, unless there is no room for it within `timeout`:
/// a thread that others wait for must not block on a stopped reader. Returns whether it was printed.
pub fn say(text: &str, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the call accesses only the structure passed to it.
    let has_room = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } > 0;
    if has_room {
        // There is nowhere else to report that it is closed or on a full disk.
        let _ = io::stderr().write_all(on_screen(text).as_bytes());
    }
    has_room
}

/// Converts `text` for the current mode of standard error: on a raw terminal a line feed alone does not return the
/// carriage.
pub fn on_screen(text: &str) -> Cow<'_, str> {
    match RAW.load(Ordering::Relaxed) && io::stderr().is_terminal() {
        true => text.replace('\n', "\r\n").into(),
        false => text.into(),
    }
}

/// The size of the terminal on standard input or output, if there is one.
pub fn window_size() -> Option<WindowSize> {
    [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().find_map(|fd| {
        let mut size = MaybeUninit::<libc::winsize>::uninit();
        // SAFETY: the request writes a complete `winsize` when it returns 0, and it is only read then.
        let size = unsafe { (libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr()) == 0).then(|| size.assume_init()) }?;
        Some(WindowSize { rows: size.ws_row, columns: size.ws_col })
    })
}

fn has_foreground_terminal() -> bool {
    // SAFETY: these calls read the state of a descriptor and of this process, and access no memory of ours.
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

/// Restores the terminal, and then takes the signal's default action.
extern "C" fn on_fatal_signal(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    // SAFETY: signal and raise are async-signal-safe and touch no memory of ours.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
