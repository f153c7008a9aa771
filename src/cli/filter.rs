//! `--filter KEY=VALUE`.

use std::str::FromStr;

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// What it is about, in lower case.
    pub key: String,
    /// The value that it must have.
    pub value: String,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Filter, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not a condition: use KEY=VALUE"))?;
        Ok(Filter { key: key.trim().to_lowercase(), value: value.trim().to_owned() })
    }
}

/// Whether a name contains `pattern`, which may begin with `^` and end with `$`: what people use of Docker's regular expressions.
pub fn matches_name(name: &str, pattern: &str) -> bool {
    // Docker's names begin with a slash.
    let (from_start, rest) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    match (from_start, rest.strip_suffix('$')) {
        (true, Some(exact)) => name == exact,
        (true, None) => name.starts_with(rest),
        (false, Some(end)) => name.ends_with(end),
        (false, None) => name.contains(rest),
    }
}

/// Whether a name is matched by a pattern in which `*` stands for anything but a slash, and `?` for one such character.
pub fn matches_glob(name: &str, pattern: &str) -> bool {
    let (name, pattern): (Vec<char>, Vec<char>) = (name.chars().collect(), pattern.chars().collect());
    // Where in the name the last `*` may end, and where the pattern goes on.
    let (mut at, mut in_pattern, mut star) = (0, 0, None);
    while at < name.len() {
        match pattern.get(in_pattern) {
            Some('*') => {
                star = Some((at, in_pattern));
                in_pattern += 1;
            }
            Some(c) if *c == name[at] || (*c == '?' && name[at] != '/') => (at, in_pattern) = (at + 1, in_pattern + 1),
            _ => match star {
                Some((end, place)) if name[end] != '/' => {
                    star = Some((end + 1, place));
                    (at, in_pattern) = (end + 1, place + 1);
                }
                _ => return false,
            },
        }
    }
    pattern[in_pattern.min(pattern.len())..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_key_and_a_value() {
        let filter = |key: &str, value: &str| Filter { key: key.into(), value: value.into() };
        assert_eq!("label=a=b".parse(), Ok(filter("label", "a=b")));
        assert_eq!("Status=".parse(), Ok(filter("status", "")));
        assert!("web".parse::<Filter>().is_err());
    }

    #[test]
    fn names_are_matched_in_part_or_with_anchors() {
        for (pattern, matches) in
            [("we", true), ("eb", true), ("^web$", true), ("^/web$", true), ("/web", true), ("", true)]
        {
            assert_eq!(matches_name("web", pattern), matches, "{pattern}");
        }
        assert!(!matches_name("web2", "^web$") && !matches_name("my-web", "^web") && !matches_name("web2", "web$"));
    }

    #[test]
    fn a_star_stands_for_anything_but_a_slash() {
        for (name, pattern) in
            [("a/b:1", "a/*"), ("a/b:1", "*/b:?"), ("abc", "a*c"), ("abab", "*ab"), ("", "*"), ("a", "a**")]
        {
            assert!(matches_glob(name, pattern), "{name} {pattern}");
        }
        for (name, pattern) in [("a/b/c", "a/*"), ("a/b", "*"), ("abc", "a?"), ("a", ""), ("a", "ab"), ("a/", "a?")] {
            assert!(!matches_glob(name, pattern), "{name} {pattern}");
        }
        assert!(!matches_glob(&"a".repeat(10_000), &("*a".repeat(20) + "b")));
    }
}
