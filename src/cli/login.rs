//! `husk login` and `husk logout`: keep and remove the credentials for a registry, where docker and podman keep them.

use std::io::{BufRead, IsTerminal, Read, stdin};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::exit::Exit;
use crate::image::login::{self, Place};
use crate::image::reference::Reference;

const LOGIN_EXAMPLES: &str = "\
Examples:
  husk login registry.example.com
  echo $TOKEN | husk login -u me --password-stdin ghcr.io

Credentials are kept in $REGISTRY_AUTH_FILE, or in config.json in $DOCKER_CONFIG or ~/.docker, or by the credential helper that is
configured there, so that docker uses them as well.";

/// The longest password.
const PASSWORD_BYTES_MAX: u64 = 64 << 10;

#[derive(Debug, Args)]
#[command(after_help = LOGIN_EXAMPLES)]
pub(super) struct Login {
    /// Registry
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io", value_parser = server)]
    server: Reference,

    /// Username
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,

    /// Password or token; visible to other users of the host
    #[arg(short, long, value_name = "PASSWORD", conflicts_with = "password_stdin")]
    password: Option<String>,

    /// Take the password from standard input
    #[arg(long)]
    password_stdin: bool,
}

#[derive(Debug, Args)]
pub(super) struct Logout {
    /// Registry
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io", value_parser = server)]
    server: Reference,
}

/// Parses a registry, also as an address, as Docker accepts it.
fn server(text: &str) -> Result<Reference, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = host.split('/').next().unwrap_or_default();
    Reference::of_registry(host).map_err(|error| format!("{error:#}"))
}

impl Login {
    /// Checks the credentials with the registry, and keeps them.
    pub fn run(self) -> Result<Exit> {
        let registry = self.server.registry.as_str();
        let user = match (self.username, self.password_stdin) {
            (Some(user), _) => user,
            (None, true) => bail!("--password-stdin needs --username"),
            (None, false) => ask("Username: ", true)?,
        };
        let password = match self.password {
            Some(password) => {
                log::warn!("a password on the command line is visible to other users: use --password-stdin");
                password
            }
            None if self.password_stdin => {
                let mut password = String::new();
                stdin().take(PASSWORD_BYTES_MAX).read_to_string(&mut password).context("read the password")?;
                password.trim_end_matches(['\r', '\n']).to_owned()
            }
            None => ask("Password: ", false)?,
        };
        ensure!(!user.is_empty() && !password.is_empty(), "a user name and a password are needed");
        ensure!(!user.contains(':'), "a user name has no colon");
        login::check(&self.server, &user, &password).with_context(|| format!("log in to {registry}"))?;
        if let Place::File(path) = login::keep(registry, &user, &password)? {
            let warning =
                "the credentials are stored unencrypted; a credential helper (`credsStore`) would change that";
            super::print_stderr(&format!("husk: {}: {warning}\n", path.display()));
        }
        super::print("Login Succeeded\n")?;
        Ok(Exit::Success)
    }
}

impl Logout {
    /// Removes the credentials.
    pub fn run(self) -> Result<Exit> {
        let registry = self.server.registry.as_str();
        let text = match login::forget(registry)? {
            true => format!("Removed the login credentials for {registry}\n"),
            false => format!("Not logged in to {registry}\n"),
        };
        super::print(&text)?;
        Ok(Exit::Success)
    }
}

/// Asks for a line on the terminal, which is shown as it is typed only if it `echoes`.
fn ask(prompt: &str, echoes: bool) -> Result<String> {
    let input = stdin();
    ensure!(input.is_terminal(), "there is no terminal to ask on: use --username and --password-stdin");
    super::print_stderr(prompt);
    let mut line = String::new();
    if echoes {
        input.lock().read_line(&mut line)?;
        return Ok(line.trim().to_owned());
    }
    let before = tcgetattr(&input)?;
    let mut quiet = before.clone();
    // Ctrl-C must not end this process before the terminal is as it was.
    quiet.local_modes &= !(LocalModes::ECHO | LocalModes::ISIG | LocalModes::ICANON);
    tcsetattr(&input, OptionalActions::Now, &quiet)?;
    let typed = typed(&mut input.lock());
    tcsetattr(&input, OptionalActions::Now, &before)?;
    super::print_stderr("\n");
    typed
}

/// What is typed until Enter.
fn typed(input: &mut impl BufRead) -> Result<String> {
    let mut bytes = Vec::new();
    for byte in input.bytes() {
        match byte? {
            b'\n' | b'\r' | 4 => break,
            3 => bail!("interrupted"),
            8 | 127 => drop(bytes.pop()),
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).context("it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_may_be_an_address() {
        for (text, registry) in [("https://index.docker.io/v1/", "docker.io"), ("localhost:5000", "localhost:5000")] {
            assert_eq!(server(text).unwrap().registry, registry);
        }
        assert!(server("a b").is_err() && server("").is_err());
    }

    #[test]
    fn a_typed_password_can_be_corrected_and_given_up() {
        assert_eq!(typed(&mut &b"secrex\x7ft\nrest"[..]).unwrap(), "secret");
        assert!(typed(&mut &b"sec\x03"[..]).is_err());
    }
}
