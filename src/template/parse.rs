//! Parses a template's pieces into nodes.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::functions;
use super::scan::{self, Piece, Token};

/// The maximum nesting of blocks and parentheses, each of which takes stack.
const MAX_DEPTH: usize = 64;

/// A part of a template.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// Text that is printed as it is.
    Text(String),
    /// A pipeline whose value is printed, unless it sets a variable.
    Print(Pipeline),
    /// `if` and `with`, which makes the value the dot: what is done if the value is true, and what otherwise.
    If { condition: Pipeline, sets_dot: bool, then: Vec<Node>, otherwise: Vec<Node> },
    /// `range`: what is done for each element, and what if there is none.
    Range { over: Pipeline, body: Vec<Node>, otherwise: Vec<Node> },
}

/// Commands, each of which gets the value of the previous one as its last argument.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    /// The variables that are set: one, or two for `range`.
    pub variables: Vec<String>,
    /// Whether they are new ones.
    pub declares: bool,
    /// The commands, at least one.
    pub commands: Vec<Vec<Operand>>,
}

/// A word of a command.
#[derive(Debug, Clone, PartialEq)]
pub struct Operand {
    /// Its start.
    pub base: Base,
    /// The fields after it.
    pub fields: Vec<String>,
}

/// The start of an operand.
#[derive(Debug, Clone, PartialEq)]
pub enum Base {
    /// The current value.
    Dot,
    /// A variable; the empty one is the template's value.
    Variable(String),
    /// A constant.
    Literal(Value),
    /// A function.
    Function(String),
    /// A pipeline in parentheses.
    Nested(Box<Pipeline>),
}

/// Parses a template.
pub fn parse(text: &str) -> Result<Vec<Node>> {
    let mut parser = Parser { pieces: scan::pieces(text)?.into(), depth: 0 };
    let (nodes, end) = parser.nodes()?;
    match end {
        None => Ok(nodes),
        Some(End::End) => bail!("{{{{end}}}} without if, with or range"),
        Some(End::Else(_)) => bail!("{{{{else}}}} without if, with or range"),
    }
}

struct Parser<'a> {
    pieces: VecDeque<Piece<'a>>,
    depth: usize,
}

/// What ends a list of nodes.
enum End {
    End,
    /// With the tokens after it.
    Else(Vec<Token>),
}

impl Parser<'_> {
    /// The nodes up to an `end` or `else`, or the template's end.
    fn nodes(&mut self) -> Result<(Vec<Node>, Option<End>)> {
        self.depth += 1;
        ensure!(self.depth <= MAX_DEPTH, "it is nested more than {MAX_DEPTH} levels deep");
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.pop_front() {
            let tokens = match piece {
                Piece::Text("") => continue,
                Piece::Text(text) => {
                    nodes.push(Node::Text(text.to_owned()));
                    continue;
                }
                Piece::Tag(tokens) => tokens,
            };
            let mut words = tokens.iter().skip_while(|token| **token == Token::Space);
            let keyword = if let Some(Token::Word(word)) = words.next() { word.as_str() } else { "" };
            let rest = words.cloned().collect();
            match keyword {
                "end" | "else" => {
                    self.depth -= 1;
                    return Ok((nodes, Some(if keyword == "end" { End::End } else { End::Else(rest) })));
                }
                "if" | "with" | "range" => nodes.push(self.block(keyword, rest)?),
                "define" | "template" | "block" | "break" | "continue" => bail!("{keyword} is not supported"),
                _ => nodes.push(Node::Print(Tokens::of(tokens).pipeline(self.depth)?)),
            }
        }
        self.depth -= 1;
        Ok((nodes, None))
    }

    /// The block that a keyword begins, up to its end.
    fn block(&mut self, keyword: &str, tokens: Vec<Token>) -> Result<Node> {
        let pipeline = Tokens::of(tokens).pipeline(self.depth)?;
        let no_end = || format!("{{{{{keyword}}}}} has no {{{{end}}}}");
        let (then, end) = self.nodes()?;
        let otherwise = match end.with_context(no_end)? {
            End::End => Vec::new(),
            End::Else(tokens) => self.otherwise(tokens).with_context(no_end)?,
        };
        Ok(match keyword {
            "range" => Node::Range { over: pipeline, body: then, otherwise },
            _ => Node::If { condition: pipeline, sets_dot: keyword == "with", then, otherwise },
        })
    }

    /// What follows an `else`: nodes, or another `if` or `with`, which shares the `end`.
    fn otherwise(&mut self, tokens: Vec<Token>) -> Result<Vec<Node>> {
        let mut words = tokens.into_iter().skip_while(|token| *token == Token::Space);
        match words.next() {
            Some(Token::Word(word)) if word == "if" || word == "with" => {
                self.depth += 1;
                ensure!(self.depth <= MAX_DEPTH, "too many else");
                let node = self.block(&word, words.collect())?;
                self.depth -= 1;
                Ok(vec![node])
            }
            Some(_) => bail!("unexpected word after else"),
            None => match self.nodes()? {
                (nodes, Some(End::End)) => Ok(nodes),
                (_, Some(End::Else(_))) => bail!("a second else"),
                (_, None) => bail!("no end"),
            },
        }
    }
}

/// The tokens of a tag.
struct Tokens(VecDeque<Token>);

impl Tokens {
    fn of(tokens: Vec<Token>) -> Tokens {
        Tokens(tokens.into())
    }

    fn skip_space(&mut self) {
        while self.0.front() == Some(&Token::Space) {
            self.0.pop_front();
        }
    }

    /// All tokens, as a pipeline.
    fn pipeline(mut self, depth: usize) -> Result<Pipeline> {
        let variables = self.variables()?;
        let (variables, declares) = variables.unwrap_or_default();
        let commands = self.commands(depth)?;
        ensure!(self.0.is_empty(), "unexpected )");
        Ok(Pipeline { variables, declares, commands })
    }

    /// `$a :=`, `$a, $b :=` and `$a =`, if the tokens start so.
    fn variables(&mut self) -> Result<Option<(Vec<String>, bool)>> {
        let place = self.0.iter().position(|token| matches!(token, Token::Declare | Token::Assign));
        let Some(place) = place else { return Ok(None) };
        let declares = self.0.get(place) == Some(&Token::Declare);
        let mut variables = Vec::new();
        for token in self.0.drain(..=place) {
            match token {
                Token::Variable(name) if !name.is_empty() => variables.push(name),
                Token::Space | Token::Comma | Token::Declare | Token::Assign => {}
                _ => bail!("only a variable can be set: use $NAME := VALUE"),
            }
        }
        ensure!((1..=2).contains(&variables.len()), "one or two variables can be set");
        Ok(Some((variables, declares)))
    }

    /// Commands up to a closing parenthesis or the end.
    fn commands(&mut self, depth: usize) -> Result<Vec<Vec<Operand>>> {
        ensure!(depth <= MAX_DEPTH, "it is nested more than {MAX_DEPTH} levels deep");
        let (mut commands, mut command) = (Vec::new(), Vec::new());
        loop {
            self.skip_space();
            match self.0.front() {
                None | Some(Token::Close) => break,
                Some(Token::Pipe) => {
                    self.0.pop_front();
                    ensure!(!command.is_empty(), "a command is missing");
                    commands.push(std::mem::take(&mut command));
                }
                Some(_) => command.push(self.operand(depth)?),
            }
        }
        ensure!(!command.is_empty(), "a command is missing");
        commands.push(command);
        Ok(commands)
    }

    fn operand(&mut self, depth: usize) -> Result<Operand> {
        let mut fields = Vec::new();
        let base = match self.0.pop_front().context("a word is missing")? {
            Token::Field(name) => {
                fields.extend(Some(name).filter(|name| !name.is_empty()));
                Base::Dot
            }
            Token::Variable(name) => Base::Variable(name),
            Token::Literal(value) => Base::Literal(value),
            Token::Word(word) => match word.as_str() {
                "true" | "false" => Base::Literal(Value::Bool(word == "true")),
                "nil" => Base::Literal(Value::Null),
                name => {
                    ensure!(functions::is_one(name), "there is no function {name:?}");
                    Base::Function(word)
                }
            },
            Token::Open => {
                let commands = self.commands(depth + 1)?;
                ensure!(self.0.pop_front() == Some(Token::Close), "a ) is missing");
                Base::Nested(Box::new(Pipeline { variables: Vec::new(), declares: false, commands }))
            }
            Token::Close | Token::Pipe | Token::Comma | Token::Declare | Token::Assign | Token::Space => {
                bail!("unexpected punctuation")
            }
        };
        let is_lone_dot = matches!(base, Base::Dot) && fields.is_empty();
        while let Some(Token::Field(name)) = self.0.front().filter(|_| !is_lone_dot) {
            ensure!(!name.is_empty(), "a . without a name");
            fields.push(name.clone());
            self.0.pop_front();
        }
        Ok(Operand { base, fields })
    }
}
