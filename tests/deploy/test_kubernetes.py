"""deploy/kubernetes: well formed, known to the API's published schemas, consistent, and as narrow as it says."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from nfqproxy import __version__
from nfqproxy.sources import config
from tests.deploy import tools
from tests.deploy.kustomize import Object, render

FOLDER = tools.DEPLOY / "kubernetes"
OVERLAYS = ("replace", "overlay", "cleanup")
SCHEMAS = ("1.29", "1.33", "1.37")
"""API servers, from the oldest to the newest tried."""
AWAITED = {"healthzBindAddress", "metricsBindAddress"}
"""Fields of the configuration file that the program does not know yet."""
CAPABILITIES = ["NET_ADMIN", "NET_RAW"]


def of_kind(objects: list[Object], kind: str) -> Object:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def pod_of(overlay: str) -> Any:
    return of_kind(render(FOLDER / "overlays" / overlay), "DaemonSet")["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "path", sorted(tools.DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.name)
)
def test_yaml_is_tidy(path: Path) -> None:
    settings = YamlLintConfig(
        "{extends: default, rules: {line-length: {max: 115}, document-start: disable,"
        " braces: {max-spaces-inside: 0}, truthy: {check-keys: false}}}"
    )
    problems = [str(each) for each in linter.run(path.read_text(), settings, str(path))]
    assert problems == []


@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_knows_every_field(overlay: str, version: str) -> None:
    for each in render(FOLDER / "overlays" / overlay):
        kubernetes_validate.validate(each, version, strict=True)


def test_an_unknown_field_is_found() -> None:
    daemon_set = of_kind(render(FOLDER / "overlays/replace"), "DaemonSet")
    daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRoot"] = (
        True
    )
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRoot"):
        kubernetes_validate.validate(daemon_set, SCHEMAS[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same_of_it(overlay: str) -> None:
    """With the kubectl of this machine, if it is one that reads folders as resources."""
    version = (
        tools.run("kubectl", "version", "--client", "--output=yaml")
        if tools.found("kubectl")
        else None
    )
    release = re.search(r"minor: \D?(\d+)", version.stdout) if version else None
    if release is None or int(release[1]) < 21:
        pytest.skip("needs kubectl 1.21 or later; what follows goes by tests/deploy/kustomize.py")
    done = tools.run("kubectl", "kustomize", FOLDER / "overlays" / overlay)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    def sorted_(objects: list[Object]) -> list[Object]:
        return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))

    rendered = sorted_(list(yaml.safe_load_all(done.stdout)))
    assert rendered == sorted_(render(FOLDER / "overlays" / overlay))


@pytest.mark.parametrize("overlay", ["replace", "overlay"])
def test_the_program_reads_its_configuration(overlay: str, tmp_path: Path) -> None:
    objects = render(FOLDER / "overlays" / overlay)
    pod = of_kind(objects, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volume = next(each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each)
    mount = next(each["mountPath"] for each in container["volumeMounts"] if each.get("readOnly"))
    assert container["args"][:2] == ["run", f"--config={mount}/config.yaml"]
    (config_map,) = (each for each in objects if each["metadata"]["name"] == volume)
    document = yaml.safe_load(config_map["data"]["config.yaml"])
    health = document.get("healthzBindAddress", "0.0.0.0:10256")
    for awaited in AWAITED:
        document.pop(awaited, None)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    assert config.load(file).mode == overlay
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert str(container[probe]["httpGet"]["port"]) == health.rpartition(":")[2]


def test_fields_that_are_awaited_have_not_come() -> None:
    known = {field.encode_name for field in msgspec.structs.fields(config.ProxyConfig)}
    assert not AWAITED & known, "take them out of AWAITED"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_as_narrow_as_can_be(overlay: str) -> None:
    pod = pod_of(overlay)
    assert not {"hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        rights = container["securityContext"]
        assert rights["privileged"] is False
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        assert rights["capabilities"]["drop"] == ["ALL"]
        # tests/kernel/test_deploy.py says why these.
        is_proxy = rights["runAsUser"] == 0
        assert rights["capabilities"].get("add", []) == (CAPABILITIES if is_proxy else [])
        assert container["image"] == f"nfqproxy:{__version__}"
        assert "ports" not in container, "hostNetwork: they would keep other pods off the node"


def test_what_the_proxy_may_ask_of_the_api() -> None:
    """Exactly this; each line more is a right that somebody who breaks into a node gains."""
    role = of_kind(render(FOLDER / "overlays/replace"), "ClusterRole")
    assert {
        (group, resource): " ".join(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    } == {
        ("", "services"): "list watch",
        ("discovery.k8s.io", "endpointslices"): "list watch",
        ("", "nodes"): "get list watch",
        ("networking.k8s.io", "servicecidrs"): "list watch",
        ("", "events"): "create patch",
        ("events.k8s.io", "events"): "create patch",
    }
    assert all(set(rule) == {"apiGroups", "resources", "verbs"} for rule in role["rules"])
