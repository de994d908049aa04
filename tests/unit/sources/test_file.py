import json
import logging
import os
import re
from pathlib import Path

import pytest

from nfqproxy.control.objects import ObjectChange, Service
from nfqproxy.control.table import service_ports
from nfqproxy.errors import ManifestError
from nfqproxy.model import Family
from nfqproxy.sources import file
from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.file import Loader, load

# Services, slices and a Node behind real kube-proxy dumps; kept beside the repository.
SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "services.yaml"


def service(name="web", address="10.96.0.10"):
    return (
        f"{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, "
        f"spec: {{clusterIP: {address}, ports: [{{name: http, port: 80}}]}}}}\n"
    )


def names(objects):
    return [item.name for item in objects.services]


def fails(*paths):
    with pytest.raises(ManifestError) as caught:
        load(paths)
    return caught.value


@pytest.mark.skipif(not SHARED.is_file(), reason=f"needs {SHARED}, beside the repository")
def test_the_shared_manifests_become_the_table_that_kube_proxy_served():
    objects = load([SHARED])
    table = service_ports(objects, node_name="n1")
    found = {
        (int(name.family), f"{name.service}:{name.port_name}"): [
            f"{endpoint.address}:{endpoint.port}" for endpoint in port.endpoints
        ]
        for name, port in table.items()
    }
    assert found == {
        (4, "web:http"): ["10.244.1.10:8080", "10.244.1.11:8080", "10.244.2.10:8080"],
        (4, "kube-dns:dns"): ["10.244.1.53:53", "10.244.2.53:53"],
        (4, "kube-dns:dns-tcp"): ["10.244.1.53:53", "10.244.2.53:53"],
        (4, "shop:http"): ["10.244.1.20:8080", "10.244.2.20:8080"],
        (4, "shop-local:http"): ["10.244.2.21:8080"],
        (4, "lb:http"): ["10.244.1.30:8080", "10.244.2.30:8080"],
        (4, "lb-local:http"): ["10.244.1.31:8080", "10.244.2.31:8080"],
        (4, "ext:http"): ["10.244.1.40:8080"],
        (4, "sticky:http"): ["10.244.1.50:8080", "10.244.2.50:8080"],
        (4, "empty:http"): [],
        (4, "itp-remote:http"): ["10.244.2.61:8080"],
        (4, "draining:http"): ["10.244.1.62:8080", "10.244.2.62:8080"],
        (4, "dual:http"): ["10.244.1.70:8080"],
        (6, "dual:http"): ["fd00:10:244:1::70:8080"],
    }
    by_service = {name.service: port for name, port in table.items()}
    assert by_service["lb"].load_balancer_source_ranges == ("192.0.2.0/24", "198.18.0.0/15")
    assert by_service["lb-local"].health_check_node_port == 30999
    assert by_service["sticky"].affinity_timeout_s == 600
    assert by_service["ext"].external_ips == ("203.0.113.9",)
    assert {name.family for name in table if name.service == "dual"} == set(Family)


def test_documents_lists_and_json(write):
    write("d/a.yaml", f"---\n{service('a')}---\n---\n{service('b')}")
    write("d/b.yml", f"apiVersion: v1\nkind: List\nitems:\n- {service('c')}- {service('d')}")
    write(
        "d/c.json",
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "ServiceList",
                "metadata": {"resourceVersion": "1"},
                "items": [
                    {"metadata": {"name": "e"}, "spec": {"clusterIP": "10.96.0.1"}},
                    {"metadata": {"name": "f"}, "spec": {"clusterIP": "10.96.0.2"}},
                ],
            }
        ),
    )
    ignored = write("d/.hidden.yaml", "nonsense: [")
    write("d/notes.txt", "nonsense: [")
    write("d/sub/deeper.yaml", "nonsense: [")
    assert names(load([ignored.parent])) == ["a", "b", "c", "d", "e", "f"]


def test_files_and_directories_together_are_each_read_once(write):
    first = write("d/a.yaml", service("a"))
    second = write("b.yaml", service("b"))
    link = first.parent / "again.yaml"
    link.symlink_to(first)
    assert names(load([first, first.parent, second, second])) == ["a", "b"]


def test_an_application_manifest_may_hold_other_kinds(write, caplog):
    caplog.set_level(logging.INFO)
    path = write(
        "app.yaml",
        f"kind: Deployment\napiVersion: apps/v1\nmetadata: {{name: x}}\n---\n{service()}",
    )
    assert names(load([path])) == ["web"]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"{path}: Deployment default/x is not used by the proxy")
    ]


def test_yaml_syntax_is_located(write):
    path = write("bad.yaml", "apiVersion: v1\nkind: [Service\nmetadata: {}\n")
    error = fails(path)
    assert error.file == str(path)
    assert str(error).startswith(f"{path}: line 3, column 9: not YAML: ")


def test_json_syntax_is_located(write):
    path = write("bad.json", '{"apiVersion": "v1",\n "kind": }')
    assert str(fails(path)) == f"{path}: line 2, column 10: not JSON: expecting value"


def test_a_key_given_twice_is_located(write):
    path = write("bad.yaml", "apiVersion: v1\nkind: Service\nspec:\n  type: NodePort\n  type: X\n")
    assert str(fails(path)) == (
        f'{path}: line 5, column 3: the key "type" is given twice in one mapping; remove one'
    )


def test_a_fault_in_an_item_without_name_tells_its_place(write):
    path = write(
        "l.yaml", "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Service}, 3]\n"
    )
    assert str(fails(path)) == (
        f"{path}: Service (document 1, items[0]): metadata.name: is missing; "
        "every object has a name"
    )
    path = write("l.yaml", "apiVersion: v1\nkind: List\nitems: [3]\n")
    assert str(fails(path)).startswith(f"{path}: document 1, items[0]: is not a Kubernetes object")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; put manifests in it or remove it"),
        ("# nothing\n---\n---\n", "is empty; put manifests in it or remove it"),
        ("apiVersion: v1\nkind: List\nitems: []\n", "no Service, EndpointSlice, "),
        ("apiVersion: v1\nkind: ConfigMap\n", "no Service, EndpointSlice, "),
        ("just text", "document 1: is not a Kubernetes object"),
        ("apiVersion: v1\nkind: List\nitems: {}\n", "List (document 1): items: must be a list"),
        (
            "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List, items: []}]",
            "List (document 1, items[0]): is a list inside a list",
        ),
        ("\x00", "not YAML"),
    ],
)  # fmt: skip
def test_a_file_with_nothing_to_serve(write, text, problem):
    path = write("m.yaml", text)
    assert str(fails(path)).startswith(f"{path}: {problem}")


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"kind: \xff\n")
    assert str(fails(path)) == f"{path}: is not UTF-8 text at byte 7; save it as UTF-8"


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + service().encode())
    assert names(load([path])) == ["web"]


def test_paths_that_cannot_be_read(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert str(fails(absent)) == (
        f"{absent}: cannot be read: no such file or directory; "
        "give the path of a manifest file or directory"
    )
    assert "the directory holds no *.yaml, *.yml, *.json" in str(fails(tmp_path))
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert "is no regular file" in str(fails(pipe))
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert "cannot be read: too many levels of symbolic links" in str(fails(loop))


def test_an_object_in_two_files_names_both(write):
    first, second = write("a.yaml", service()), write("b.yaml", service(address="10.96.0.11"))
    assert str(fails(first, second)) == (
        f"{second}: Service default/web: is given in {first} too; remove one of the two"
    )
    twice = write("c.yaml", f"{service()}---\n{service()}")
    assert "is given twice in this file" in str(fails(twice))


def test_names_are_apart_by_kind_and_namespace(write):
    other = service().replace("{name: web}", "{name: web, namespace: other}")
    node = "{apiVersion: v1, kind: Node, metadata: {name: web}}\n"
    objects = load([write("a.yaml", f"{service()}---\n{other}---\n{node}")])
    assert [(item.namespace, item.name) for item in objects.services] == [
        ("default", "web"),
        ("other", "web"),
    ]
    assert len(objects) == 3


def test_only_altered_files_are_decoded_again(write, monkeypatch):
    first, second = write("d/a.yaml", service("a")), write("d/b.yaml", service("b"))
    decoded = []
    decode = file.decode
    monkeypatch.setattr(
        file, "decode", lambda *arguments: decoded.append(arguments[1].origin) or decode(*arguments)
    )
    loader = Loader([first.parent])
    loader.load()
    assert names(loader.objects) == ["a", "b"]
    write("d/b.yaml", service("c"))
    change = loader.load()
    assert [item.name for item in change.upserts] == ["c"]
    assert change.removes == ((Service, "default", "b"),)
    assert names(loader.objects) == ["a", "c"]
    assert decoded == [str(first), str(second), str(second)]
    second.unlink()
    assert loader.load() == ObjectChange(removes=((Service, "default", "c"),))
    assert names(loader.objects) == ["a"]
    assert len(decoded) == 3


def test_only_named_files_are_read_again(write, monkeypatch):
    first, second = write("d/a.yaml", service("a")), write("d/b.yaml", service("b"))
    loader = Loader([first.parent])
    loader.load()
    read = []
    whole = on_disk.read
    monkeypatch.setattr(on_disk, "read", lambda name: read.append(name) or whole(name))
    write("d/b.yaml", service("b") + "---\n" + service("c"))
    change = loader.load_altered([second])
    assert [item.name for item in change.upserts] == ["c"]
    assert not change.removes
    assert read == [second]
    write("d/b.yaml", service("c").replace("port: 80", "port: 81"))
    change = loader.load_altered([second])
    assert [item.ports[0].port for item in change.upserts] == [81]
    assert change.removes == ((Service, "default", "b"),)
    assert names(loader.objects) == ["a", "c"]
    assert not loader.load_altered([second])


def test_a_fault_in_a_named_file_changes_nothing(write):
    first, second = write("d/a.yaml", service("a")), write("d/b.yaml", service("b"))
    loader = Loader([first.parent])
    loader.load()
    good = loader.objects
    for text, told in (
        (service("c") + "---\n" + service("a"), f"Service default/a: is given in {first} too"),
        (service("c") * 1 + "---\n" + service("c"), "is given twice in this file"),
        ("", "is empty"),
    ):
        write("d/b.yaml", text)
        with pytest.raises(ManifestError, match=re.escape(told)):
            loader.load_altered([second])
        assert loader.objects == good
    # An object may move from one file to the other.
    write("d/a.yaml", service("b"))
    write("d/b.yaml", service("a"))
    assert not loader.load_altered([first, second]).removes
    assert names(loader.objects) == ["a", "b"]


def test_a_file_not_read_before_leads_to_a_look_at_all(write):
    first = write("d/a.yaml", service("a"))
    loader = Loader([first.parent])
    loader.load()
    second = write("d/b.yaml", service("b"))
    assert [item.name for item in loader.load_altered([second]).upserts] == ["b"]
    assert names(loader.objects) == ["a", "b"]


def test_a_file_that_turns_bad_and_back_leaves_no_trace(write):
    path = write("a.yaml", service("a"))
    loader = Loader([path])
    loader.load()
    good = loader.objects
    write("a.yaml", "kind: [")
    with pytest.raises(ManifestError):
        loader.load()
    assert loader.objects == good
    write("a.yaml", service("a"))
    assert not loader.load()
    assert loader.objects == good


def test_the_manifest_in_the_documentation_is_read(write):
    page = (Path(__file__).parents[3] / "docs" / "manifests.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    objects = load([write("m.yaml", example)])
    (port,) = service_ports(objects, node_name="n1").values()
    weights = {endpoint.address: endpoint.weight for endpoint in port.endpoints}
    assert weights == {"10.244.1.10": 5, "10.244.1.11": 3, "10.244.2.10": 2}
    assert [node.name for node in objects.nodes] == ["n1"]
