//! The functions of templates: those of Go's text/template, and Docker's.

use std::cmp::Ordering;
use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The widest padding.
const MAX_WIDTH: usize = 4096;

const NAMES: [&str; 24] = [
    "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "index", "len", "slice", "print", "println", "printf",
    "json", "join", "split", "lower", "upper", "title", "pad", "truncate", "html",
];

/// Whether there is a function of this name.
pub fn is_one(name: &str) -> bool {
    NAMES.contains(&name)
}

/// A value as Go prints it.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("[{}]", list.iter().map(shown).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let pairs: Vec<String> = map.iter().map(|(key, value)| format!("{key}:{}", shown(value))).collect();
            format!("map[{}]", pairs.join(" "))
        }
        other => other.to_string(),
    }
}

/// Whether a value is neither empty nor zero.
pub fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is) => *is,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// The element of a list at a number, or of a map with a key: empty text if there is none.
pub fn index(value: &Value, key: &Value) -> Result<Value> {
    match (value, key) {
        (Value::Object(map), Value::String(key)) => Ok(map.get(key).cloned().unwrap_or_else(|| "".into())),
        (Value::Null, Value::String(_)) => Ok("".into()),
        (Value::Array(list), Value::Number(at)) => {
            let found = at.as_u64().and_then(|at| list.get(usize::try_from(at).ok()?));
            found.cloned().with_context(|| format!("there is no element {at} in a list of {}", list.len()))
        }
        _ => bail!("{} has no element {}", shown(value), shown(key)),
    }
}

/// Calls a function, other than `and` and `or`.
pub fn call(name: &str, arguments: &[Value]) -> Result<Value> {
    let one = || match arguments {
        [one] => Ok(one),
        _ => bail!("it takes one argument, not {}", arguments.len()),
    };
    let text = || one().map(shown);
    let words = || arguments.iter().map(shown).collect::<Vec<_>>();
    Ok(match name {
        "not" => (!is_true(one()?)).into(),
        "eq" => {
            let (first, others) = arguments.split_first().context("it takes two arguments")?;
            ensure!(!others.is_empty(), "it takes two arguments");
            others.iter().any(|other| order(first, other) == Some(Ordering::Equal)).into()
        }
        "ne" | "lt" | "le" | "gt" | "ge" => compare(name, arguments)?,
        "index" => {
            let (first, keys) = arguments.split_first().context("it takes a list or a map")?;
            keys.iter().try_fold(first.clone(), |value, key| index(&value, key))?
        }
        "len" => len(one()?)?.into(),
        "slice" => slice(arguments)?,
        "print" => words().concat().into(),
        "println" => (words().join(" ") + "\n").into(),
        "printf" => {
            let (format, values) = arguments.split_first().context("it takes a format")?;
            printf(&shown(format), values)?.into()
        }
        "json" => serde_json::to_string(one()?)?.into(),
        "html" => text()?.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").into(),
        "lower" => text()?.to_lowercase().into(),
        "upper" => text()?.to_uppercase().into(),
        "title" => title(&text()?).into(),
        "join" => match arguments {
            [Value::Array(list), separator] => {
                list.iter().map(shown).collect::<Vec<_>>().join(&shown(separator)).into()
            }
            [Value::Null, _] => "".into(),
            _ => bail!("it takes a list and a separator"),
        },
        "split" => match arguments {
            [text, separator] => shown(text).split(&shown(separator)).map(Value::from).collect(),
            _ => bail!("it takes a text and a separator"),
        },
        "pad" => match arguments {
            [text, ..] if shown(text).is_empty() => "".into(),
            [text, before, after] => pad(&shown(text), width(before)?, width(after)?).into(),
            _ => bail!("it takes a text and two numbers"),
        },
        "truncate" => match arguments {
            [text, max] => shown(text).chars().take(width(max)?).collect::<String>().into(),
            _ => bail!("it takes a text and a number"),
        },
        _ => bail!("there is no such function"),
    })
}

fn pad(text: &str, before: usize, after: usize) -> String {
    format!("{:before$}{text}{:after$}", "", "")
}

fn width(value: &Value) -> Result<usize> {
    let width = value.as_u64().and_then(|width| usize::try_from(width).ok()).context("the width is not a number")?;
    ensure!(width <= MAX_WIDTH, "a width of {width} is too large");
    Ok(width)
}

fn order(one: &Value, other: &Value) -> Option<Ordering> {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64()?.partial_cmp(&other.as_f64()?),
        (Value::String(one), Value::String(other)) => Some(one.cmp(other)),
        _ => (one == other).then_some(Ordering::Equal),
    }
}

fn compare(name: &str, arguments: &[Value]) -> Result<Value> {
    let [one, other] = arguments else { bail!("it takes two arguments, not {}", arguments.len()) };
    let order = order(one, other);
    if name == "ne" {
        return Ok((order != Some(Ordering::Equal)).into());
    }
    let order = order.with_context(|| format!("{} and {} have no order", shown(one), shown(other)))?;
    Ok(match name {
        "lt" => order.is_lt(),
        "le" => order.is_le(),
        "gt" => order.is_gt(),
        _ => order.is_ge(),
    }
    .into())
}

fn len(value: &Value) -> Result<usize> {
    Ok(match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        Value::Null => 0,
        other => bail!("{} has no length", shown(other)),
    })
}

/// `slice X FROM TO`: part of a text or a list.
fn slice(arguments: &[Value]) -> Result<Value> {
    let (value, bounds) = arguments.split_first().context("it takes a text or a list")?;
    let len = len(value)?;
    let bound = |at: usize| bounds.get(at).map(|bound| bound.as_u64().and_then(|bound| usize::try_from(bound).ok()));
    let from = bound(0).unwrap_or(Some(0)).context("a bound is not a number")?;
    let to = bound(1).unwrap_or(Some(len)).context("a bound is not a number")?;
    let outside = || format!("{from} to {to} is outside of {len}");
    Ok(match value {
        Value::Array(list) => list.get(from..to).with_context(outside)?.to_vec().into(),
        other => shown(other).get(from..to).with_context(outside)?.into(),
    })
}

fn title(text: &str) -> String {
    let mut is_start = true;
    let letter = |c: char| {
        let upper: String = if is_start { c.to_uppercase().collect() } else { c.into() };
        is_start = !c.is_alphanumeric();
        upper
    };
    text.chars().map(letter).collect()
}

/// Go's `%s`, `%v`, `%q`, `%d`, `%t`, `%x` and `%%`, with `-`, a width and a precision.
fn printf(format: &str, values: &[Value]) -> Result<String> {
    let (mut out, mut values, mut chars) = (String::new(), values.iter(), format.chars().peekable());
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let flags: String =
            std::iter::from_fn(|| chars.next_if(|c| matches!(c, '-' | '+' | '0' | '#' | ' '))).collect();
        let digits: String = std::iter::from_fn(|| chars.next_if(|c| c.is_ascii_digit() || *c == '.')).collect();
        let verb = chars.next().context("a % without a letter")?;
        if verb == '%' {
            out.push('%');
            continue;
        }
        let value = values.next().with_context(|| format!("there is no value for %{verb}"))?;
        let (min, max) = digits.split_once('.').map_or((digits.as_str(), None), |(min, max)| (min, Some(max)));
        let number = |digits: &str| width(&digits.parse::<u64>().unwrap_or(0).into());
        let (min, max) = (number(min)?, max.map(number).transpose()?);
        let text = match verb {
            's' | 'v' | 'd' | 't' | 'f' => shown(value),
            'q' => format!("{:?}", shown(value)),
            'x' => value.as_i64().map(|number| format!("{number:x}")).context("%x takes a number")?,
            other => bail!("%{other} is not supported"),
        };
        let text: String = text.chars().take(max.unwrap_or(usize::MAX)).collect();
        let _ = if flags.contains('-') { write!(out, "{text:<min$}") } else { write!(out, "{text:>min$}") };
    }
    Ok(out)
}
