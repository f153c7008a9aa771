//! Tests of the flags for mounts.

use super::*;

fn bind(source: &str, target: &str, readonly: bool, creates: bool) -> Mount {
    let source = Source::Bind { path: source.into(), creates };
    Mount { source, target: target.into(), access: Access { readonly, ..Access::default() } }
}

fn volume(name: Option<&str>, target: &str, access: Access) -> Mount {
    Mount { source: Source::Volume(name.map(String::from)), target: target.into(), access }
}

#[test]
fn a_volume_is_a_source_a_path_and_options() {
    let parse = |text: &str| parse_volume(&text.into()).map_err(|error| error.to_string());
    assert_eq!(parse("/a:/b"), Ok(bind("/a", "/b", false, true)));
    assert_eq!(parse("./a b:/b:ro,Z"), Ok(bind("./a b", "/b", true, true)));
    assert_eq!(parse(".:/src:rw"), Ok(bind(".", "/src", false, true)));
    assert_eq!(parse("../x:/b:z"), Ok(bind("../x", "/b", false, true)));
    let (plain, readonly) = (Access::default(), Access { readonly: true, ..Access::default() });
    assert_eq!(parse("data:/var/lib:ro"), Ok(volume(Some("data"), "/var/lib", readonly)));
    let owned = Access { owned: true, copies: false, ..plain };
    assert_eq!(parse("data:/d:nocopy,U,z"), Ok(volume(Some("data"), "/d", owned)));
    assert_eq!(parse("/data"), Ok(volume(None, "/data", plain)));
    let cached = Access { cache: ShareCache::Always, readonly: true, ..plain };
    assert_eq!(parse("data:/d:cache=always,ro"), Ok(volume(Some("data"), "/d", cached)));
    for (wrong, why) in [
        ("a", "no path in the machine"),
        ("v", "no path in the machine"),
        ("/", "not a mount point"),
        ("/a/..", "not a mount point"),
        ("/a:b", "not a mount point"),
        ("/a:/", "not a mount point"),
        ("/a:/b/..", "not a mount point"),
        (":/b", "no source"),
        ("/a:/b:rx", "unknown option"),
        ("/a:/b:cache=some", "unknown cache mode"),
        ("/a:/b:ro,U", "remove one of them"),
        ("/a:/b:ro:x", "too many colons"),
        ("a b:/c", "volume name"),
        ("a/b:/c", "volume name"),
    ] {
        assert!(parse(wrong).unwrap_err().contains(why), "{wrong}: {:?}", parse(wrong));
    }
}

#[test]
fn a_mount_is_a_list_of_keys() {
    let parse = |text: &str| parse_mount(&text.into()).map_err(|error| error.to_string());
    assert_eq!(parse("type=bind,source=a,target=/b,readonly"), Ok(bind("a", "/b", true, false)));
    assert_eq!(parse("type=bind,src=/a,dst=/b,ro=false"), Ok(bind("/a", "/b", false, false)));
    let access = |copies, owned| Access { copies, owned, ..Access::default() };
    let uncached = Access { cache: ShareCache::Never, ..Access::default() };
    assert_eq!(parse("source=data,target=/d,cache=never"), Ok(volume(Some("data"), "/d", uncached)));
    assert_eq!(parse("source=data,destination=/d"), Ok(volume(Some("data"), "/d", access(true, false))));
    assert_eq!(
        parse("source=data,target=/d,volume-nocopy,U=true"),
        Ok(volume(Some("data"), "/d", access(false, true)))
    );
    assert_eq!(parse("type=volume,target=/d"), Ok(volume(None, "/d", access(true, false))));
    let tmpfs = parse("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777").map(|mount| mount.source);
    let Ok(Source::Tmpfs(tmpfs)) = tmpfs else { panic!() };
    assert_eq!((tmpfs.path.as_slice(), tmpfs.options.as_str()), (&b"/t"[..], "size=1m,mode=1777"));
    for (wrong, why) in [
        ("type=bind,source=/a", "no target"),
        ("type=bind,target=/a", "no source"),
        ("type=npipe,source=/a,target=/b", "unknown type"),
        ("type=bind,source=/a,target=/b,uid=3", "unknown key"),
        ("source=/a,target=/b", "type=bind"),
        ("source=a,target=/b,ro=maybe", "use true or false"),
    ] {
        assert!(parse(wrong).unwrap_err().contains(why), "{wrong}: {:?}", parse(wrong));
    }
}

#[test]
fn one_mount_does_not_hide_another_one() {
    let check = |targets: &[&str]| {
        let words = targets.iter().map(|target| format!("/a:{target}").into());
        check_distinct(&words.map(|word| parse_volume(&word).unwrap()).collect::<Vec<_>>())
    };
    check(&["/b", "/b/c", "/c"]).unwrap();
    assert!(check(&["/b", "/c", "//b/"]).unwrap_err().to_string().contains("two mounts on //b/"));
}

#[test]
fn mounts_of_another_machine_can_be_made_readonly() {
    assert_eq!(volumes_from("web").unwrap(), ("web", false));
    assert_eq!(volumes_from("web:ro").unwrap(), ("web", true));
    assert_eq!(volumes_from("web:z").unwrap(), ("web", false));
    assert!(volumes_from("web:x").unwrap_err().to_string().contains("unknown option"));
}
