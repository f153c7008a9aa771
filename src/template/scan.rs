//! Splits a template into text and tags, and a tag into tokens.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A part of a template.
#[derive(Debug, PartialEq)]
pub enum Piece<'a> {
    /// Text that is printed as it is.
    Text(&'a str),
    /// The tokens between `{{` and `}}`.
    Tag(Vec<Token>),
}

/// A token of a tag.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// A keyword, a function, or `true`, `false` and `nil`.
    Word(String),
    /// `.NAME`; empty for a `.` by itself.
    Field(String),
    /// `$NAME`; empty for `$`.
    Variable(String),
    /// A string, a character or a number.
    Literal(Value),
    /// `(`
    Open,
    /// `)`
    Close,
    /// `|`
    Pipe,
    /// `,`
    Comma,
    /// `:=`
    Declare,
    /// `=`
    Assign,
    /// White space, which separates `.a .b` from `.a.b`.
    Space,
}

/// Splits a template. `{{-` and `-}}` remove the white space next to them, and comments are left out.
pub fn pieces(text: &str) -> Result<Vec<Piece<'_>>> {
    let mut pieces = Vec::new();
    let (mut rest, mut trims) = (text, false);
    while let Some((before, after)) = rest.split_once("{{") {
        let trims_before = after.starts_with("- ");
        let after = if trims_before { &after[1..] } else { after };
        let start = if trims { before.trim_start() } else { before };
        pieces.push(Piece::Text(if trims_before { start.trim_end() } else { start }));
        let inside = after.trim_start();
        let tag = if let Some(comment) = inside.strip_prefix("/*") {
            let (_, end) = comment.split_once("*/").context("a comment has no end")?;
            let end = end.trim_start();
            Tag { tokens: Vec::new(), rest: end.strip_prefix('-').unwrap_or(end), trims: end.starts_with('-') }
        } else {
            tag(after)?
        };
        rest = tag.rest.strip_prefix("}}").context("a tag has no }}")?;
        trims = tag.trims;
        if !tag.tokens.is_empty() {
            pieces.push(Piece::Tag(tag.tokens));
        }
    }
    pieces.push(Piece::Text(if trims { rest.trim_start() } else { rest }));
    Ok(pieces)
}

/// A tag that was read up to its `}}`.
struct Tag<'a> {
    tokens: Vec<Token>,
    rest: &'a str,
    trims: bool,
}

fn tag(mut rest: &str) -> Result<Tag<'_>> {
    let mut tokens = Vec::new();
    loop {
        if rest.starts_with("}}") {
            return Ok(Tag { tokens, rest, trims: false });
        }
        if let Some(end) = rest.strip_prefix('-').filter(|end| end.starts_with("}}")) {
            return Ok(Tag { tokens, rest: end, trims: true });
        }
        let (token, after) = token(rest)?;
        tokens.push(token);
        rest = after;
    }
}

fn token(text: &str) -> Result<(Token, &str)> {
    let first = text.chars().next().context("a tag has no }}")?;
    let after = &text[first.len_utf8()..];
    Ok(match first {
        '(' => (Token::Open, after),
        ')' => (Token::Close, after),
        '|' => (Token::Pipe, after),
        ',' => (Token::Comma, after),
        '=' => (Token::Assign, after),
        ':' => (Token::Declare, after.strip_prefix('=').context("a : without =")?),
        ' ' | '\t' | '\r' | '\n' => (Token::Space, after.trim_start_matches([' ', '\t', '\r', '\n'])),
        '.' => word(after).map_or((Token::Field(String::new()), after), |(name, rest)| (Token::Field(name), rest)),
        '$' => {
            word(after).map_or((Token::Variable(String::new()), after), |(name, rest)| (Token::Variable(name), rest))
        }
        '`' => {
            let (raw, rest) = after.split_once('`').context("a string has no end")?;
            (Token::Literal(raw.into()), rest)
        }
        '"' | '\'' => quoted(after, first)?,
        '0'..='9' | '-' | '+' => number(text)?,
        _ => {
            let (name, rest) = word(text).with_context(|| format!("unexpected {first:?}"))?;
            (Token::Word(name), rest)
        }
    })
}

/// Letters, digits and `_`, not with a digit first.
fn word(text: &str) -> Option<(String, &str)> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    (!name.is_empty() && !name.starts_with(|c: char| c.is_numeric())).then(|| (name.to_owned(), rest))
}

fn number(text: &str) -> Result<(Token, &str)> {
    let is_inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-');
    let (digits, rest) = text.split_at(text.find(|c| !is_inside(c)).unwrap_or(text.len()));
    // In `5-}}` it belongs to the end of the tag.
    let is_end = rest.starts_with("}}") && digits.ends_with('-');
    let (digits, rest) = if is_end { text.split_at(digits.len() - 1) } else { (digits, rest) };
    let whole = digits.parse::<i64>().map(Value::from).ok();
    let value = whole.or_else(|| digits.parse::<f64>().ok().map(Value::from));
    Ok((Token::Literal(value.with_context(|| format!("{digits:?} is not a number"))?), rest))
}

/// A string or a character with Go's escapes. A line break is allowed, as `\n` in a format becomes one.
fn quoted(text: &str, quote: char) -> Result<(Token, &str)> {
    let (mut value, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        if c == quote {
            let rest = &text[at + c.len_utf8()..];
            let mut letters = value.chars();
            return Ok(match (quote, letters.next(), letters.next()) {
                ('"', ..) => (Token::Literal(value.into()), rest),
                // A character is a number in Go.
                (_, Some(only), None) => (Token::Literal(u32::from(only).into()), rest),
                _ => bail!("'{value}' is not a single character: use \""),
            });
        }
        let escaped = if c == '\\' { chars.next().map(|(_, c)| c) } else { None };
        value.push(match escaped {
            None => c,
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('x') => hex(&mut chars, 2)?,
            Some('u') => hex(&mut chars, 4)?,
            Some(same @ ('\\' | '"' | '\'')) => same,
            Some(other) => bail!("unknown escape \\{other}"),
        });
    }
    bail!("a string has no end")
}

fn hex(chars: &mut std::str::CharIndices<'_>, count: usize) -> Result<char> {
    let digits: String = chars.take(count).map(|(_, c)| c).collect();
    ensure!(digits.len() == count, "an escape is too short");
    u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32).context("an escape is not hexadecimal")
}
