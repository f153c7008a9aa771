//! Evaluates a template's nodes.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::fields;
use super::functions::{self, is_true, shown};
use super::parse::{Base, Node, Operand, Pipeline};

/// The longest output, beyond what any list needs: loops in loops could go on for very long.
const MAX_BYTES: usize = 256 << 20;

/// The output of `nodes` for `value`.
pub fn render(nodes: &[Node], value: &Value) -> Result<String> {
    let mut state = State { out: String::new(), variables: vec![(String::new(), value.clone())] };
    state.nodes(nodes, value)?;
    Ok(state.out)
}

struct State {
    out: String,
    /// Innermost last.
    variables: Vec<(String, Value)>,
}

impl State {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<()> {
        let outer = self.variables.len();
        for node in nodes {
            self.node(node, dot)?;
            ensure!(self.out.len() <= MAX_BYTES, "the output is too long");
        }
        self.variables.truncate(outer);
        Ok(())
    }

    fn node(&mut self, node: &Node, dot: &Value) -> Result<()> {
        match node {
            Node::Text(text) => self.out.push_str(text),
            Node::Print(pipeline) => {
                let value = self.pipeline(pipeline, dot)?;
                if pipeline.variables.is_empty() {
                    self.out.push_str(&shown(&value));
                } else {
                    self.set(pipeline, &[value])?;
                }
            }
            Node::If { condition, sets_dot, then, otherwise } => {
                let outer = self.variables.len();
                let value = self.pipeline(condition, dot)?;
                self.set(condition, std::slice::from_ref(&value))?;
                match is_true(&value) {
                    true => self.nodes(then, if *sets_dot { &value } else { dot })?,
                    false => self.nodes(otherwise, dot)?,
                }
                self.variables.truncate(outer);
            }
            Node::Range { over, body, otherwise } => self.range(over, body, otherwise, dot)?,
        }
        Ok(())
    }

    fn range(&mut self, over: &Pipeline, body: &[Node], otherwise: &[Node], dot: &Value) -> Result<()> {
        let elements: Vec<(Value, Value)> = match self.pipeline(over, dot)? {
            Value::Null => Vec::new(),
            Value::Array(list) => list.into_iter().enumerate().map(|(at, value)| (at.into(), value)).collect(),
            Value::Object(map) => map.into_iter().map(|(key, value)| (key.into(), value)).collect(),
            other => bail!("range over {}: use it with a list or a map", shown(&other)),
        };
        if elements.is_empty() {
            return self.nodes(otherwise, dot);
        }
        for (key, value) in elements {
            let outer = self.variables.len();
            match over.variables.len() {
                2 => self.set(over, &[key, value.clone()])?,
                _ => self.set(over, std::slice::from_ref(&value))?,
            }
            self.nodes(body, &value)?;
            self.variables.truncate(outer);
        }
        Ok(())
    }

    /// Sets the variables of a pipeline.
    fn set(&mut self, pipeline: &Pipeline, values: &[Value]) -> Result<()> {
        ensure!(pipeline.variables.len() <= values.len(), "only range sets two variables");
        for (name, value) in pipeline.variables.iter().zip(values) {
            if pipeline.declares {
                self.variables.push((name.clone(), value.clone()));
                continue;
            }
            let found = self.variables.iter_mut().rev().find(|(known, _)| known == name);
            found.with_context(|| format!("there is no variable ${name}"))?.1 = value.clone();
        }
        Ok(())
    }

    fn pipeline(&self, pipeline: &Pipeline, dot: &Value) -> Result<Value> {
        let mut value = None;
        for command in &pipeline.commands {
            value = Some(self.command(command, value, dot)?);
        }
        value.context("an empty command")
    }

    fn command(&self, command: &[Operand], piped: Option<Value>, dot: &Value) -> Result<Value> {
        let (first, rest) = command.split_first().context("an empty command")?;
        let Base::Function(name) = &first.base else {
            let value = self.operand(first, dot)?;
            let mut keys = rest.iter().map(|operand| self.operand(operand, dot)).chain(piped.map(Ok)).peekable();
            ensure!(keys.peek().is_none() || !first.fields.is_empty(), "{} is not a function", shown(&value));
            // A column's header has no parts.
            return keys.try_fold(value, |value, key| match value {
                text @ Value::String(_) => Ok(text),
                value => functions::index(&value, &key?),
            });
        };
        ensure!(first.fields.is_empty(), "the function {name} has no fields: use parentheses");
        // They stop at the first argument that decides.
        if let "and" | "or" = name.as_str() {
            let mut last = Value::Null;
            for operand in rest {
                last = self.operand(operand, dot)?;
                if is_true(&last) == (name == "or") {
                    return Ok(last);
                }
            }
            return Ok(piped.unwrap_or(last));
        }
        let arguments: Result<Vec<Value>> = rest.iter().map(|operand| self.operand(operand, dot)).collect();
        let mut arguments = arguments?;
        arguments.extend(piped);
        functions::call(name, &arguments).with_context(|| name.clone())
    }

    fn operand(&self, operand: &Operand, dot: &Value) -> Result<Value> {
        let base = match &operand.base {
            Base::Dot => dot.clone(),
            Base::Variable(name) => {
                let found = self.variables.iter().rev().find(|(known, _)| known == name);
                found.with_context(|| format!("there is no variable ${name}"))?.1.clone()
            }
            Base::Literal(value) => value.clone(),
            Base::Function(name) => functions::call(name, &[]).with_context(|| name.clone())?,
            Base::Nested(pipeline) => self.pipeline(pipeline, dot)?,
        };
        operand.fields.iter().try_fold(base, |value, field| match value {
            Value::Object(map) => part(map, field),
            Value::Null => bail!("there is no field .{field}, because there is no value before it"),
            other => bail!("there is no field .{field} in {}", shown(&other)),
        })
    }
}

/// A part of an object.
fn part(mut map: Map<String, Value>, field: &str) -> Result<Value> {
    let names: Vec<&str> = map.keys().map(String::as_str).collect();
    let known = fields::find(&names, field)?.to_owned();
    Ok(map.remove(&known).unwrap_or_default())
}
