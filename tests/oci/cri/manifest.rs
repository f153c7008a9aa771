//! The manifest of docs/kubernetes.md.

use std::collections::BTreeMap;

use husk::oci::machine::{GUEST_OVERHEAD_MIB, HOST_OVERHEAD_MIB};

/// The values of a YAML document by path: block mappings, and sequences of them, of scalars on one line. Their items have no number, so
/// that a path may have several values.
fn values(document: &str) -> BTreeMap<String, Vec<String>> {
    let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut path: Vec<(usize, String)> = Vec::new();
    for line in document.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let text = line.trim_start().trim_start_matches("- ");
        let Some((key, value)) = text.split_once(':') else { continue };
        let indent = line.len() - text.len();
        path.retain(|(outer, _)| *outer < indent);
        path.push((indent, key.to_owned()));
        let name: Vec<&str> = path.iter().map(|(_, key)| key.as_str()).collect();
        let value = value.trim().trim_matches('"');
        values.entry(name.join(".")).or_default().extend((!value.is_empty()).then(|| value.to_owned()));
    }
    values
}

#[test]
fn the_manifest_is_for_the_handler_and_counts_what_a_machine_takes() {
    let text = include_str!("../../../docs/kubernetes.yaml");
    let (class, pod) = text.split_once("\n---\n").unwrap();
    let (class, pod) = (values(class), values(pod));
    assert_eq!((class["apiVersion"][0].as_str(), class["kind"][0].as_str()), ("node.k8s.io/v1", "RuntimeClass"));
    assert_eq!(class["handler"], [super::HANDLER]);
    let overhead = GUEST_OVERHEAD_MIB + HOST_OVERHEAD_MIB;
    assert_eq!(class["overhead.podFixed.memory"], [format!("{overhead}Mi")]);
    let (key, label) = class.iter().find(|(key, _)| key.starts_with("scheduling.nodeSelector.")).unwrap();
    let label = format!("{}={}", key.rsplit('.').next().unwrap(), label[0]);
    assert!(super::GUIDE.contains(&format!("kubectl label node NODE {label}\n")), "{label}");
    assert_eq!((pod["apiVersion"][0].as_str(), pod["kind"][0].as_str()), ("v1", "Pod"));
    assert_eq!(pod["spec.runtimeClassName"], class["metadata.name"]);
    assert_eq!(pod["spec.containers.name"].len(), 2);
    for name in ["image", "command", "resources.limits.memory", "resources.limits.cpu"] {
        assert_eq!(pod[&format!("spec.containers.{name}")].len(), 2, "{name}");
    }
}
