//! Resolves the user of a process with the root file system's /etc/passwd and /etc/group.
//!
//! The rules are those that images expect: names take precedence over numbers, a number need not be listed, and an
//! explicit group replaces all of the user's groups.

/// The identity of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user ID.
    pub uid: u32,
    /// The group ID.
    pub gid: u32,
    /// All groups, starting with `gid`.
    pub groups: Vec<u32>,
    /// The home directory; `/` for an unlisted user.
    pub home: Vec<u8>,
}

/// A line of /etc/passwd.
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// A line of /etc/group.
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// The maximum number of groups of a process (NGROUPS_MAX).
const GROUPS_MAX: usize = 65536;

impl Identity {
    /// Adds groups by name or number, which are resolved with the content of /etc/group.
    pub fn join(&mut self, wanted: &[String], group: &[u8]) -> Result<(), String> {
        for wanted in wanted.iter().take(GROUPS_MAX - self.groups.len()) {
            let gid = find_group(wanted, group)?;
            if !self.groups.contains(&gid) {
                self.groups.push(gid);
            }
        }
        Ok(())
    }
}

/// Resolves `wanted` (`USER[:GROUP]`, empty is root) with the contents of the two files. Errors are one line.
pub fn find(wanted: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, String> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = number(user.as_bytes());
    let listed = users(passwd)
        .find(|listed| listed.name == user.as_bytes())
        .or_else(|| users(passwd).find(|listed| Some(listed.uid) == number));
    let mut identity = match (&listed, number) {
        (Some(user), _) => Identity { uid: user.uid, gid: user.gid, groups: Vec::new(), home: user.home.to_vec() },
        (None, Some(uid)) => Identity { uid, gid: 0, groups: Vec::new(), home: b"/".to_vec() },
        (None, None) => return Err(format!("no user {user:?} in the image's /etc/passwd")),
    };
    if identity.home.is_empty() {
        identity.home = b"/".to_vec();
    }
    match (wanted_group, &listed) {
        (Some(wanted), _) => identity.gid = find_group(wanted, group)?,
        (None, Some(user)) => {
            let member =
                groups(group).filter(|group| group.members.split(|&b| b == b',').any(|name| name == user.name));
            identity.groups.extend(member.map(|group| group.gid).take(GROUPS_MAX - 1));
        }
        (None, None) => {}
    }
    identity.groups.retain(|gid| *gid != identity.gid);
    identity.groups.insert(0, identity.gid);
    Ok(identity)
}

/// The name of the user `uid`, if it is listed.
pub fn name_of(uid: u32, passwd: &[u8]) -> Option<String> {
    let user = users(passwd).find(|user| user.uid == uid)?;
    Some(String::from_utf8_lossy(user.name).into_owned())
}

/// The home directory of the user `uid`; `/` if it is not listed.
pub fn home_of(uid: u32, passwd: &[u8]) -> Vec<u8> {
    let home = users(passwd).find(|user| user.uid == uid).map(|user| user.home).filter(|home| !home.is_empty());
    home.unwrap_or(b"/").to_vec()
}

fn find_group(wanted: &str, group: &[u8]) -> Result<u32, String> {
    let number = number(wanted.as_bytes());
    groups(group)
        .find(|group| group.name == wanted.as_bytes())
        .map(|group| group.gid)
        .or(number)
        .ok_or_else(|| format!("no group {wanted:?} in the image's /etc/group"))
}

/// Parses an ID: digits, less than 2^31, the limit of programs with 32-bit signed IDs.
fn number(text: &[u8]) -> Option<u32> {
    let digits = text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok().filter(|id| *id < 1 << 31)
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty() && !line.starts_with(b"#"))
}

fn users(passwd: &[u8]) -> impl Iterator<Item = User<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next()?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next()?;
        let gid = number(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# a word\nbad line\nweb:x:33:33:www:/var/www:/bin/false\n\
        1000:x:7:7::/seven:\nuser:x:1000:100::/home/user:/bin/sh\nnohome:x:50:50\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:33:\nusers:x:100:other\nwheel:x:10:root,user\naudio:x:63:user\n55:x:56:\n";

    fn who(wanted: &str) -> (u32, u32, Vec<u32>, String) {
        let identity = find(wanted, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups, String::from_utf8(identity.home).unwrap())
    }

    #[test]
    fn a_listed_user_has_its_group_its_memberships_and_its_home() {
        assert_eq!(who("user"), (1000, 100, vec![100, 10, 63], "/home/user".into()));
        assert_eq!(who(""), (0, 0, vec![0, 10], "/root".into()));
        assert_eq!(who("0"), who(""));
        assert_eq!(who("33"), (33, 33, vec![33], "/var/www".into()));
        assert_eq!(who("nohome"), (50, 50, vec![50], "/".into()));
    }

    #[test]
    fn names_take_precedence_over_numbers() {
        assert_eq!(who("1000"), (7, 7, vec![7], "/seven".into()));
        assert_eq!(who("root:55"), (0, 56, vec![56], "/root".into()));
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        assert_eq!(who("user:wheel"), (1000, 10, vec![10], "/home/user".into()));
        assert_eq!(who("user:4242"), (1000, 4242, vec![4242], "/home/user".into()));
        assert_eq!(who(":audio"), (0, 63, vec![63], "/root".into()));
        assert_eq!(who("user:"), who("user"));
    }

    #[test]
    fn groups_are_added_once() {
        let mut identity = find("user", PASSWD, GROUP).unwrap();
        identity.join(&["users".into(), "4242".into(), "web".into(), "4242".into()], GROUP).unwrap();
        assert_eq!(identity.groups, [100, 10, 63, 4242, 33]);
        assert!(identity.join(&["none".into()], GROUP).unwrap_err().contains("\"none\""));
    }

    #[test]
    fn only_names_must_be_listed() {
        assert_eq!(who("4242"), (4242, 0, vec![0], "/".into()));
        assert_eq!(who("4242:43"), (4242, 43, vec![43], "/".into()));
        assert!(find("nobody", PASSWD, GROUP).unwrap_err().contains("\"nobody\""));
        assert!(find("root:none", PASSWD, GROUP).unwrap_err().contains("\"none\""));
        for odd in ["-1", "2147483648", "+1", "root:2147483648", "root:-1"] {
            assert!(find(odd, PASSWD, GROUP).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_image_without_user_files_supports_only_numbers() {
        assert_eq!(find("5:6", b"", b"").unwrap().groups, [6]);
        assert_eq!(find("", b"", b"").unwrap().home, b"/");
        assert!(find("root", b"", b"").is_err());
    }
}
