"""What kustomize makes of deploy/kubernetes, for machines without it: exactly the fields in use there.

Anything else is an error. test_kubernetes.py holds it to the real one where kubectl 1.21 or later is at hand.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_FIELDS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "patches"}
_CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding"}


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    text = (folder / "kustomization.yaml").read_text()
    kustomization: Object = yaml.safe_load(text)
    unknown = set(kustomization) - _FIELDS
    assert not unknown, f"{folder}: {unknown} is not understood here"
    objects: list[Object] = []
    for name in kustomization["resources"]:
        path = folder / name
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in kustomization.get("patches", ()):
        assert set(patch) == {"path"}
        _patch(objects, yaml.safe_load((folder / patch["path"]).read_text()))
    renamed = {}
    for generator in kustomization.get("configMapGenerator", ()):
        config_map = _config_map(folder, generator)
        renamed[generator["name"]] = config_map["metadata"]["name"]
        objects.append(config_map)
    for each in objects:
        for reference in _references(each):
            reference["name"] = renamed.get(reference["name"], reference["name"])
        if each["kind"] not in _CLUSTER_WIDE:
            each["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def _patch(objects: list[Object], patch: Object) -> None:
    """A strategic merge."""
    identity = (patch["kind"], patch["metadata"]["name"])
    (target,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == identity)
    _merge(target, patch)


def _merge(target: Object, patch: Object) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and key in target:
            _merge(target[key], value)
        elif isinstance(value, list):
            # Lists of named things only.
            by_name = {each["name"]: each for each in target[key]}
            for each in value:
                _merge(by_name[each["name"]], each)
        else:
            target[key] = value


def _config_map(folder: Path, generator: Object) -> Object:
    assert set(generator) <= {"name", "files", "literals"}
    data = {name: (folder / name).read_text() for name in generator.get("files", ())}
    data |= dict(each.split("=", 1) for each in generator.get("literals", ()))
    name = f"{generator['name']}-{_hash(data)}"
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _hash(data: Object) -> str:
    """The suffix: digits of a SHA-256 that cannot be read as words (kustomize api/hasher/hasher.go)."""
    # The name is empty there: it is looked up by "metadata/name", which is no field.
    document = {"data": data, "kind": "ConfigMap", "name": ""}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    digits = hashlib.sha256(text.encode()).hexdigest()[:10]
    return digits.translate(str.maketrans("013ae", "ghkmt"))


def _references(each: Object) -> Iterator[Object]:
    """Where a pod names a ConfigMap."""
    if each["kind"] != "DaemonSet":
        return
    pod = each["spec"]["template"]["spec"]
    for volume in pod["volumes"]:
        if "configMap" in volume:
            yield volume["configMap"]
    for container in pod["containers"]:
        for source in container.get("envFrom", ()):
            yield source["configMapRef"]
