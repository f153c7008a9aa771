//! Changes to the configuration of an image, as instructions of a Dockerfile: `husk import --change`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

/// Applies an instruction, such as `CMD ["sh"]` or `ENV A=b`, to `config`, the process configuration of an image (OCI image
/// specification, config.md).
pub fn apply(config: &mut Map<String, Value>, instruction: &str) -> Result<()> {
    let (word, rest) = instruction.trim().split_once(char::is_whitespace).unwrap_or((instruction.trim(), ""));
    let rest = rest.trim();
    let mut apply = || -> Result<()> {
        ensure!(!rest.is_empty(), "it has no value");
        match word.to_ascii_uppercase().as_str() {
            "CMD" => drop(config.insert("Cmd".into(), command(rest)?)),
            "ENTRYPOINT" => {
                config.insert("Entrypoint".into(), command(rest)?);
                // A command was meant for the former entrypoint.
                config.remove("Cmd");
            }
            "ENV" => {
                for (key, value) in pairs(rest)? {
                    set_variable(config, &key, &value);
                }
            }
            "LABEL" => {
                for (key, value) in pairs(rest)? {
                    add(config, "Labels", key, value.into());
                }
            }
            "EXPOSE" => {
                for port in rest.split_whitespace() {
                    let port = if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") };
                    add(config, "ExposedPorts", port, json!({}));
                }
            }
            "VOLUME" => {
                for path in words(rest)? {
                    add(config, "Volumes", path, json!({}));
                }
            }
            "USER" => drop(config.insert("User".into(), rest.into())),
            "WORKDIR" => drop(config.insert("WorkingDir".into(), rest.into())),
            "STOPSIGNAL" => drop(config.insert("StopSignal".into(), rest.into())),
            _ => bail!("use CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR"),
        }
        Ok(())
    };
    apply().with_context(|| format!("invalid change {instruction:?}"))
}

/// Adds a key to the object at `name`.
pub(super) fn add(config: &mut Map<String, Value>, name: &str, key: String, value: Value) {
    let known = config.remove(name);
    let mut object = if let Some(Value::Object(map)) = known { map } else { Map::new() };
    object.insert(key, value);
    config.insert(name.to_owned(), Value::Object(object));
}

fn set_variable(config: &mut Map<String, Value>, key: &str, value: &str) {
    let prefix = format!("{key}=");
    let mut env: Vec<Value> = config.get("Env").and_then(Value::as_array).cloned().unwrap_or_default();
    let is_same = |known: &Value| known.as_str().is_some_and(|known| known.starts_with(&prefix));
    let variable = Value::from(prefix.clone() + value);
    match env.iter().position(is_same) {
        Some(at) => env[at] = variable,
        None => env.push(variable),
    }
    config.insert("Env".into(), env.into());
}

/// A command as a JSON list, or as a line for the shell.
fn command(text: &str) -> Result<Value> {
    if text.starts_with('[') {
        return Ok(json!(serde_json::from_str::<Vec<String>>(text).context("it is not a list of strings")?));
    }
    Ok(json!(["/bin/sh", "-c", text]))
}

/// Words as a JSON list, or separated by spaces.
fn words(text: &str) -> Result<Vec<String>> {
    if text.starts_with('[') {
        return serde_json::from_str(text).context("it is not a list of strings");
    }
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// `KEY=VALUE ...`, with quotes or backslashes around spaces, or `KEY VALUE`.
fn pairs(text: &str) -> Result<Vec<(String, String)>> {
    if let Some((key, value)) = text.split_once(char::is_whitespace).filter(|(key, _)| !key.contains('=')) {
        return Ok(vec![(key.to_owned(), value.trim().to_owned())]);
    }
    let (mut all, mut word, mut quote, mut chars) = (Vec::new(), String::new(), None, text.chars());
    let mut take = |word: &mut String| -> Result<()> {
        if !word.is_empty() {
            let (key, value) = word.split_once('=').with_context(|| format!("{word:?} has no ="))?;
            ensure!(!key.is_empty(), "{word:?} has no name");
            all.push((key.to_owned(), value.to_owned()));
            word.clear();
        }
        Ok(())
    };
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', None | Some('"')) => word.extend(chars.next()),
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => quote = Some(c),
            (c, None) if c.is_whitespace() => take(&mut word)?,
            (c, _) => word.push(c),
        }
    }
    ensure!(quote.is_none(), "a quote has no end");
    take(&mut word)?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_change_the_configuration() {
        let mut config = Map::new();
        config.insert("Env".into(), json!(["A=old", "P=/bin"]));
        for instruction in [
            r#"CMD ["a", "b c"]"#,
            "env A=b C=\"d e\" F=g\\ h",
            "ENV G h  i",
            "EXPOSE 80 53/udp",
            "LABEL k='v w'",
            "VOLUME /a /b",
            "USER 1:2",
            "WORKDIR /w",
            "STOPSIGNAL SIGINT",
        ] {
            apply(&mut config, instruction).unwrap();
        }
        let expected = json!({
            "Cmd": ["a", "b c"], "Env": ["A=b", "P=/bin", "C=d e", "F=g h", "G=h  i"], "Labels": {"k": "v w"},
            "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Volumes": {"/a": {}, "/b": {}}, "User": "1:2",
            "WorkingDir": "/w", "StopSignal": "SIGINT",
        });
        assert_eq!(Value::Object(config.clone()), expected);
        apply(&mut config, "ENTRYPOINT exec x").unwrap();
        assert_eq!((&config["Entrypoint"], config.get("Cmd")), (&json!(["/bin/sh", "-c", "exec x"]), None));
        for wrong in ["RUN x", "CMD", "CMD [1]", "ENV a=b c", "ENV =b", "LABEL a='b", ""] {
            assert!(apply(&mut config, wrong).is_err(), "{wrong}");
        }
    }
}
