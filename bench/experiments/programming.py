"""How soon the data path follows its source: at the start, and after one endpoint has changed.

``first_sync`` runs from the start of the command until connections to the first, the middle and the last
Service have each reached their pod; at 1 Service it is the start of the processes. ``endpoint_change``
runs from the rename of the manifest (source ``kubernetes``: from the write to the API
server) that moves a Service's only endpoint until the first connection has
reached the new one. During the change connections are made one after the other: each must reach the old
pod or the new one, and after the first at the new one none may come to the old one any more.

``load_rules``, beside: how long iptables-restore and nft take for kube-proxy's rules of so many Services.
That is a part of kube-proxy's own first sync, not all of it.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.api_server import Move
from bench.bars import NFQPROXY
from bench.contenders import KubeProxyIptables, KubeProxyNftables
from bench.contenders.kubeproxy_rules import iptables_rules, nftables_rules
from bench.observation import Observation, Parameter, Scale
from bench.proxy_node import ProxyNode, load_rules, proxy_node
from bench.service_files import Change, ServiceFiles, Source, service_name
from bench.services import BACKEND_PORT, PORT, VIP, Endpoint, ServicePort, table
from bench.world import NODE_ADDRESS
from nfqproxy.lab.addresses import PODS4

SYNC_ENDPOINTS, CHANGE_ENDPOINTS = 3, 16
"""Endpoints of each Service: 15,000 and 80,000 at 5,000 Services."""

_MOST_SERVICES = 5000
"""What the design's bars speak of; more would only take longer."""
_SYNC_LIMIT_S, _CHANGE_LIMIT_S = 120.0, 60.0
_AFTERWARDS = 20
"""Connections that must all reach the new endpoint."""

_MEASURED = ServicePort(
    name="web",
    address=VIP,
    port=PORT,
    endpoints=tuple(
        Endpoint(address=f"10.244.1.{10 + index}", port=BACKEND_PORT)
        for index in range(SYNC_ENDPOINTS)
    ),
)

RULES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[ServicePort]], str]]] = {
    KubeProxyIptables.name: (
        ("iptables-restore", "-w", "--noflush"),
        lambda services: iptables_rules(services, PODS4),
    ),
    KubeProxyNftables.name: (
        ("nft", "-f", "-"),
        lambda services: nftables_rules(services, PODS4, NODE_ADDRESS),
    ),
}
"""Contender -> the command that loads its rules, and their text for some Services."""


class Programming:
    """First sync and one change, from a directory and from one file."""

    name = "programming"
    title = "How soon is a manifest in force?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """See :class:`bench.observation.Experiment`."""
        # One big YAML file takes ten times as long to read, and so does the API server: only where time
        # is asked for.
        slow = (Source.FILE, Source.KUBERNETES)
        sources = [one for one in Source if scale.name == "full" or one not in slow]
        numbers = sorted({scale.services[0], most(scale)})
        chance = random.Random(scale.seed)
        # Every round starts the proxy anew, several times: half as many do.
        rounds = range(1, max(1, scale.rounds // 2) + 1)
        found: list[Observation] = []
        with proxy_node() as node, tempfile.TemporaryDirectory(prefix="nfqb-") as scratch:
            for number in rounds:
                steps = [(services, source) for services in numbers for source in sources]
                for services, source in chance.sample(steps, len(steps)):
                    progress(
                        f"round {number} of {rounds[-1]}: first sync of {services:,} Services "
                        f"from a {source.value}"
                    )
                    files = _files(scratch, source, services, SYNC_ENDPOINTS)
                    found.append(_observe("first_sync", _sync(node, files), number, files))
            for source in chance.sample(sources, len(sources)):
                files = _files(scratch, source, most(scale), CHANGE_ENDPOINTS)
                values = _changes(node, files, len(rounds), progress)
                found += [
                    _observe("endpoint_change", value, number, files)
                    for number, value in enumerate(values, 1)
                ]
            for number in rounds:
                for name in chance.sample(list(RULES), len(RULES)):
                    progress(f"round {number} of {rounds[-1]}: rules of {name}")
                    command, rules = RULES[name]
                    services = most(scale)
                    parameters: dict[str, Parameter] = {
                        "services": services,
                        "endpoints": services * SYNC_ENDPOINTS,
                    }
                    seconds = load_rules(command, rules(table(_MEASURED, services)))
                    found.append(
                        _observation("load_rules", seconds, number, parameters, contender=name)
                    )
        return found


def most(scale: Scale) -> int:
    """The largest number of Services of a scale that the bars speak of."""
    return max((count for count in scale.services if count <= _MOST_SERVICES), default=1)


def _files(scratch: str, source: Source, services: int, endpoints: int) -> ServiceFiles:
    """For a directory of its own, which a second use would find in its way."""
    return ServiceFiles(
        directory=Path(tempfile.mkdtemp(dir=scratch)),
        source=source,
        services=services,
        endpoints=endpoints,
    )


def _sync(node: ProxyNode, files: ServiceFiles) -> float:
    """Seconds until all probes are served."""
    files.write(node.pods[0])
    with node.served(files) as server, node.proxy(files.path, server) as running:
        return max(
            running.wait_connected(probe, 0, within_s=_SYNC_LIMIT_S) for probe in files.probes
        )


def _changes(
    node: ProxyNode, files: ServiceFiles, rounds: int, progress: Callable[[str], None]
) -> list[float]:
    """Seconds of so many changes, one after the other, the endpoint going to and fro.

    One unreported change comes before: the proxy may have begun to serve before it watches its files.
    """
    files.write(node.pods[0])
    values = []
    with node.served(files) as server, node.proxy(files.path, server) as running:
        for probe in files.probes:
            running.wait_connected(probe, 0, within_s=_SYNC_LIMIT_S)
        asked = files.probes[-1]
        old, new = 0, 1
        for number in range(rounds + 1):
            progress(
                f"change {number} of {rounds}: one endpoint of {files.services * files.endpoints:,} "
                f"from a {files.source.value}"
            )
            pod = node.pods[new]
            change: Change | Move = files.prepare_change(pod, others=node.pods[0])
            if server is not None:
                change = server.prepare_move(service_name(files.services - 1), pod)
            followed = running.changes()
            change.apply()
            seconds = running.wait_moved(asked, old, new, within_s=_CHANGE_LIMIT_S)
            change.finish()
            if number:
                values.append(seconds)
            for _ in range(_AFTERWARDS):
                came_to = node.connect(asked, 3.0)
                running.raise_unless(
                    came_to == new,
                    f"after the change a connection came to pod {came_to}, not {new}",
                )
            running.wait_changes(followed + 1, within_s=_CHANGE_LIMIT_S)
            old, new = new, old
    return values


def _observe(metric: str, seconds: float, number: int, files: ServiceFiles) -> Observation:
    endpoints = files.services * files.endpoints
    parameters: dict[str, Parameter] = {
        "services": files.services,
        "endpoints": endpoints,
        "source": files.source.value,
    }
    return _observation(metric, seconds, number, parameters)


def _observation(
    metric: str,
    seconds: float,
    number: int,
    parameters: dict[str, Parameter],
    *,
    contender: str = NFQPROXY,
) -> Observation:
    return Observation(
        experiment=Programming.name,
        contender=contender,
        metric=metric,
        unit="ms",
        value=seconds * 1000,
        round=number,
        parameters=parameters,
    )
