//! Templates as they stand in scripts.

use serde_json::json;

use super::*;

fn value() -> Value {
    json!({
        "Id": "0123456789abcdef", "Name": "web", "Created": "2026-01-01T00:00:00Z",
        "State": {"Status": "running", "Running": true, "ExitCode": 0, "Health": null},
        "Config": {"Cmd": ["sh", "-c", "true"], "Labels": {"a": "1", "b": "<2>"}, "Env": []},
        "NetworkSettings": {"Networks": {"web": {"IPAddress": "10.86.0.2"}, "db": {"IPAddress": "10.86.1.2"}}},
        "Size": 4096, "Label": {"a": "1"},
    })
}

#[track_caller]
fn check(template: &str, expected: &str) {
    let rendered = Template::parse(template).and_then(|template| template.render(&value()));
    assert_eq!(rendered.map_err(|error| format!("{error:#}")), Ok(expected.to_owned()), "{template}");
}

#[test]
fn fields_and_text_are_printed_as_in_go() {
    check("plain", "plain");
    check("{{.State.Status}}\t{{ .Name }}", "running\tweb");
    check("{{.State.Running}} {{.State.ExitCode}} {{.State.Health}}", "true 0 <no value>");
    check("{{.ID}} {{.NetworkSettings.Networks.web.IpAddress}}", "0123456789abcdef 10.86.0.2");
    check("{{.Config.Cmd}} {{.Config.Labels}}", "[sh -c true] map[a:1 b:<2>]");
    check("{{json .Config.Labels}}", r#"{"a":"1","b":"<2>"}"#);
    check("{{json .State.Health}}{{.Label \"a\"}}{{.Label \"no\"}}", "null1");
    check("{{- /* nothing */ -}} x {{- \"y\" -}} \n z", "xyz");
    check("{{\"a\\n\\\"\\u00e9\"}}{{`\\`}}{{'x'}}{{1.5}}", "a\n\"é\\1201.5");
}

#[test]
fn blocks_choose_and_repeat() {
    check("{{if .State.Running}}up{{else}}down{{end}}", "up");
    check("{{if .State.Health}}{{.State.Health.Status}}{{else if .Config.Env}}e{{else}}none{{end}}", "none");
    check("{{range .Config.Cmd}}<{{.}}>{{end}}{{range .Config.Env}}x{{else}}empty{{end}}", "<sh><-c><true>empty");
    check(
        "{{range $k, $v := .NetworkSettings.Networks}}{{$k}}={{$v.IPAddress}} {{end}}",
        "db=10.86.1.2 web=10.86.0.2 ",
    );
    check("{{range $i, $e := .Config.Cmd}}{{if $i}},{{end}}{{$e}}{{end}}", "sh,-c,true");
    check("{{with .State}}{{.Status}}{{$.Name}}{{end}}{{with .Config.Env}}x{{end}}", "runningweb");
    check("{{$x := 1}}{{if true}}{{$x = 2}}{{end}}{{$x}}", "2");
    check("{{range .NetworkSettings.Networks}}{{println .IPAddress}}{{end}}", "10.86.1.2\n10.86.0.2\n");
}

#[test]
fn functions_are_gos_and_dockers() {
    check("{{index .Config.Labels \"b\"}}{{index .Config.Labels \"no\"}}{{index .Config.Cmd 1}}", "<2>-c");
    check("{{(index .NetworkSettings.Networks \"web\").IPAddress}}", "10.86.0.2");
    check(
        "{{join .Config.Cmd \" \"}}|{{upper .Name}}|{{.Name | title | printf \"%5s|%-5s|\" \"a\"}}",
        "sh -c true|WEB|    a|Web  |",
    );
    check(
        "{{len .Config.Cmd}}{{len .Name}}{{truncate .Id 4}}{{slice .Id 0 2}}{{printf \"%.3s%%%d\" .Id .Size}}",
        "33012301012%4096",
    );
    check(
        "{{eq .Name \"db\" \"web\"}}{{ne .Size 4096}}{{and .Name .State.ExitCode}}{{or .State.Health \"x\"}}",
        "truefalse0x",
    );
    check("{{lt 1 2}}{{ge .Size 4096}}{{not .Name}}{{if eq (len .Config.Cmd) 3}}3{{end}}", "truetruefalse3");
    check(
        "{{json (split \"a,b\" \",\")}}{{pad .Name 1 2}}{{html \"<\"}}{{print 1 \"a\"}}",
        "[\"a\",\"b\"] web  &lt;1a",
    );
}

#[test]
fn mistakes_are_errors() {
    for (template, words) in [
        (
            "{{.Nope}}",
            "there is no field .Nope, there are Config, Created, Id, Label, Name, NetworkSettings, Size, State",
        ),
        ("{{.State.Health.Status}}", "no value before it"),
        ("{{.Name.x}}", "no field .x in web"),
        ("{{nope}}", "no function \"nope\""),
        ("{{.Name", "has no }}"),
        ("{{if .Name}}x", "{{if}} has no {{end}}"),
        ("{{end}}", "without if"),
        ("{{else}}", "without if"),
        ("{{if .Name}}{{else}}{{else}}{{end}}", "a second else"),
        ("{{\"x}}", "no end"),
        ("{{(.Name}}", "a ) is missing"),
        ("{{.Name)}}", "unexpected )"),
        ("{{}}{{|}}", "a command is missing"),
        ("{{$x}}", "no variable $x"),
        ("{{.Name := 1}}", "only a variable"),
        ("{{index .Config.Cmd 9}}", "no element 9 in a list of 3"),
        ("{{range .Name}}{{end}}", "range over web"),
        ("{{pad .Name 1 99999}}", "too large"),
        ("{{printf \"%999999s\" 1}}", "too large"),
        ("{{1 2}}", "1 is not a function"),
        ("{{define \"x\"}}{{end}}", "define is not supported"),
        ("{{.a..b}}", "a . without a name"),
        ("{{lt .Name 1}}", "have no order"),
    ] {
        let rendered = Template::parse(template).and_then(|template| template.render(&value()));
        let error = format!("{:#}", rendered.map(drop).expect_err(template));
        assert!(error.contains(words), "{template}: {error}");
    }
}

#[test]
fn deep_nesting_is_refused() {
    let deep = |count: usize| {
        [
            format!("{{{{{}1{}}}}}", "(".repeat(count), ")".repeat(count)),
            "{{if 1}}".repeat(count) + &"{{end}}".repeat(count),
            "{{if 1}}".to_owned() + &"{{else if 1}}".repeat(count) + "{{end}}",
        ]
    };
    for template in deep(20) {
        assert!(Template::parse(&template).is_ok(), "{template}");
    }
    for template in deep(10_000) {
        assert!(
            format!("{:#}", Template::parse(&template).unwrap_err()).contains("nested") || template.contains("else")
        );
        assert!(Template::parse(&template).is_err());
    }
}

#[test]
fn unknown_fields_are_found_without_a_value() {
    let check = |template: &str| Template::parse(template).unwrap().check(&["ID", "Labels"]);
    for known in [
        "x{{.Id}}{{upper .Labels}}{{$.ID}}",
        "{{range .Labels}}{{.Any}}{{$.ID}}{{end}}",
        "{{with .Labels}}{{.Any}}{{else}}{{.ID}}{{end}}",
        "{{json .}}{{(index .Labels 1).Any}}{{$x := .ID}}{{$x.Any}}",
    ] {
        check(known).unwrap_or_else(|error| panic!("{known}: {error:#}"));
    }
    for unknown in [
        "{{.Nope}}",
        "{{upper .Nope}}",
        "{{if .ID}}{{else}}{{(print $.Nope)}}{{end}}",
        "{{range .ID}}{{$.Nope}}{{end}}",
        "{{with .ID}}{{else}}{{.Nope}}{{end}}",
    ] {
        let error = format!("{:#}", check(unknown).unwrap_err());
        assert_eq!(error, "use the template: there is no field .Nope, there are ID, Labels", "{unknown}");
    }
}
