//! Which fields a template names, before there is a value.

use anyhow::{Context, Result};

use super::parse::{Base, Node, Operand, Pipeline};

/// The most fields that an error lists.
const SHOWN_MAX: usize = 40;

/// Fails for a field of the value that is none of `known`. Where the dot is another value, nothing is known of its fields.
pub fn check(nodes: &[Node], known: &[&str]) -> Result<()> {
    nodes.iter().try_for_each(|node| check_node(node, Some(known), known))
}

/// What is known of the dot's fields is `dot`, and of the whole value's `value`.
fn check_node(node: &Node, dot: Option<&[&str]>, value: &[&str]) -> Result<()> {
    let all = |nodes: &[Node], dot| nodes.iter().try_for_each(|node| check_node(node, dot, value));
    match node {
        Node::Text(_) => Ok(()),
        Node::Print(pipeline) => check_pipeline(pipeline, dot, value),
        Node::If { condition, sets_dot, then, otherwise } => {
            check_pipeline(condition, dot, value)?;
            all(then, dot.filter(|_| !sets_dot))?;
            all(otherwise, dot)
        }
        Node::Range { over, body, otherwise } => {
            check_pipeline(over, dot, value)?;
            all(body, None)?;
            all(otherwise, dot)
        }
    }
}

fn check_pipeline(pipeline: &Pipeline, dot: Option<&[&str]>, value: &[&str]) -> Result<()> {
    pipeline.commands.iter().flatten().try_for_each(|operand| check_operand(operand, dot, value))
}

fn check_operand(operand: &Operand, dot: Option<&[&str]>, value: &[&str]) -> Result<()> {
    let known = match &operand.base {
        Base::Dot => dot,
        Base::Variable(name) => name.is_empty().then_some(value),
        Base::Nested(pipeline) => return check_pipeline(pipeline, dot, value),
        Base::Literal(_) | Base::Function(_) => None,
    };
    match (known, operand.fields.first()) {
        (Some(known), Some(field)) => find(known, field).map(drop),
        _ => Ok(()),
    }
}

/// The name of a field as it is known. Go's names differ from those in JSON by the case of some letters, such as ID, and both are used.
pub fn find<'a>(known: &[&'a str], field: &str) -> Result<&'a str> {
    let same = known.iter().find(|name| **name == field);
    same.or_else(|| known.iter().find(|name| name.eq_ignore_ascii_case(field))).copied().with_context(|| {
        let shown = known.get(..SHOWN_MAX).unwrap_or(known).join(", ");
        let more = if known.len() > SHOWN_MAX { ", …" } else { "" };
        format!("there is no field .{field}, there are {shown}{more}")
    })
}
