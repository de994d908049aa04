"""The test API server as a process in a namespace of the lab, as the tests of the Kubernetes source start it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.lab.api_server import ApiServerProcess, start_api_server
from nfqproxy.lab.topology import Topology

SERVICES = "/api/v1/namespaces/lab/services"
MET_S = 20.0


@pytest.fixture(scope="module")
def api_server(
    module_topology: Topology, tmp_path_factory: pytest.TempPathFactory
) -> ApiServerProcess:
    """It ends with the topology."""
    client = module_topology.client
    directory = tmp_path_factory.mktemp("api")
    return start_api_server(client.namespace, directory, address=client.address4)


def names(api_server: ApiServerProcess) -> list[str]:
    return [item["metadata"]["name"] for item in api_server.ask("GET", SERVICES)["items"]]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MET_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def manifest(name: str) -> str:
    return (
        f"{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: lab}}, "
        "spec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}}\n"
    )


def test_another_host_of_the_lab_reaches_it(
    api_server: ApiServerProcess, module_topology: Topology
) -> None:
    node = module_topology.node.namespace
    answer = node.run(
        "curl", "-sk", f"https://{module_topology.client.address4}:6443/api/v1/services"
    )
    assert '"reason":"Unauthorized"' in answer.stdout


def test_it_follows_its_manifests(api_server: ApiServerProcess) -> None:
    file = api_server.manifests / "web.yaml"
    file.write_text(manifest("web") + "---\n" + manifest("dns").replace("0.7", "0.8"))
    until(lambda: names(api_server) == ["dns", "web"])
    before = api_server.ask("GET", f"{SERVICES}/web")
    file.write_text(manifest("web"))
    until(lambda: names(api_server) == ["web"])
    assert api_server.ask("GET", f"{SERVICES}/web") == before
    # What is wrong is told and changes nothing; what clients made stays.
    made = {"metadata": {"name": "mine"}, "spec": {"ports": [{"port": 80}]}}
    api_server.ask("POST", SERVICES, made)
    file.write_text(manifest("web").replace("80", "70000"))
    until(lambda: "web.yaml: Service lab/web: " in api_server.log.read_text())
    assert names(api_server) == ["mine", "web"]
    file.unlink()
    until(lambda: names(api_server) == ["mine"])


def test_faults_and_refusals_are_switched_from_outside(api_server: ApiServerProcess) -> None:
    state = api_server.ask("PUT", "/nfqproxy/faults", {"500": 1})
    assert state["faults"] == {"500": 1}
    with pytest.raises(NfqproxyError, match="500"):
        names(api_server)
    assert api_server.ask("POST", "/nfqproxy/settle")["counts"]["500"] == 1
    with pytest.raises(NfqproxyError, match="there is no fault"):
        api_server.ask("PUT", "/nfqproxy/faults", {"cut": 0.5, "cuts": 1})
    assert api_server.ask("GET", "/nfqproxy/state")["faults"] == {}
    api_server.ask("POST", "/nfqproxy/deny", {"verb": "list", "plural": "services"})
    with pytest.raises(NfqproxyError, match='cannot list resource \\\\"services\\\\"'):
        names(api_server)
    api_server.ask("POST", "/nfqproxy/allow", {"verb": "list", "plural": "services"})
    before = api_server.ask("POST", "/nfqproxy/restart", {"down_s": 0.05})
    until(lambda: is_back(api_server, before["compacted"]))


def is_back(api_server: ApiServerProcess, compacted: int) -> bool:
    try:
        state = api_server.ask("GET", "/nfqproxy/state")
    except OSError:
        return False
    return bool(state["compacted"] > compacted)


def test_a_server_that_cannot_start_says_why(module_topology: Topology, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot listen on 192\.0\.2\.99 port 6443"):
        start_api_server(module_topology.client.namespace, tmp_path, address="192.0.2.99")
