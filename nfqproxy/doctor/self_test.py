"""The live self-test: the real proxy, one TCP connection and one UDP exchange through it.

::

    client c1 ---- lan ---- node n1 (python -m nfqproxy run) ---- pod (echo server)

All in namespaces of a random name, removed however the test ends. What must hold: the backend
answers; conntrack holds the entry with the NAT that the worker asked for; userspace has seen exactly
one packet of each of the two flows.
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Any

from msgspec.structs import replace

from nfqproxy.api import admin
from nfqproxy.doctor.abilities import prerequisites
from nfqproxy.doctor.check import Finding, fail, ok
from nfqproxy.doctor.program import REQUIRED_TOOLS
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel import iptables
from nfqproxy.kernel.rule_settings import RuleSettings
from nfqproxy.lab import addresses as plan
from nfqproxy.lab.topology import Topology, TopologySpec
from nfqproxy.model import Protocol
from nfqproxy.wire import ctnetlink
from nfqproxy.worker.conntrack import ConntrackSocket

__all__ = ["self_test"]

_VIP = "10.96.0.80"
_SERVICE_PORT = 80
_ECHO_PORT = 7007
_NAME = "doctor"
_START_S = 30.0
"""The longest wait for the proxy to serve; it takes about a second."""
_ANSWER_S = 5.0
_EXCHANGES = 10
"""Messages per flow: all but the first packet must stay in the kernel."""


class _SelfTestError(Exception):
    """What did not hold, as one sentence."""


def self_test(settings: RuleSettings) -> Finding:
    """Run it; ``fail`` names the step that did not hold. Queue number and back end as in earnest."""
    problem = prerequisites(*REQUIRED_TOOLS)
    if problem is not None:
        return problem
    # Chosen by the rules that are here, not by those of the empty node.
    backend = iptables.choose_backend(settings.iptables)
    built = Topology(TopologySpec(clients=1, pods=(1,)))
    with tempfile.TemporaryDirectory(prefix="nfqproxy-doctor-") as directory:
        try:
            with Path(directory, "proxy.log").open("w+b") as log:
                proxy = _start(built, Path(directory), log, replace(settings, iptables=backend))
                _wait_until_it_serves(built, proxy, log)
                _exercise(built)
        except (_SelfTestError, NfqproxyError, OSError) as error:
            return fail(
                f"in throw-away namespaces: {error}",
                "the proxy does not serve on this host",
                "mend what fails above first; if nothing does, run nfqproxy lab up and look with"
                " the commands that it prints",
            )
        finally:
            built.close()
    return ok(
        f"one TCP connection and one UDP exchange, {_EXCHANGES} messages each, through the real"
        " proxy: both translated in conntrack, one packet each seen by userspace"
    )


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold signals back to the end of the block: no child may start unknown to its namespace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda number, _frame: held.append(number))
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _start(
    built: Topology, directory: Path, log: IO[bytes], settings: RuleSettings
) -> "subprocess.Popen[bytes]":
    with _interrupts_deferred():
        built.build()
        node, pod = built.node, built.pods[0]
        manifest = directory / "service.json"
        manifest.write_text(json.dumps(_manifest(pod.address4)), encoding="utf-8")
        server = pod.namespace.popen(
            sys.executable, "-m", "nfqproxy.lab.echo", _NAME, str(_ECHO_PORT)
        )
        proxy = node.namespace.popen(
            *(sys.executable, "-m", "nfqproxy", "run", "--manifests", str(manifest)),
            *("--node-name", node.name, "--node-address", node.address4),
            *(
                "--cluster-cidr",
                plan.PODS4,
                "--queue",
                str(settings.first_queue),
                "--iptables",
                settings.iptables.value,
            ),
            *("--data-path", settings.data_path.value, "--mark-mask", str(settings.mark_mask)),
            stdout=log,
            stderr=log,
        )
    pod.namespace.wait_for_port(pod.address4, _ECHO_PORT, process=server)
    return proxy


def _manifest(backend: str) -> dict[str, Any]:
    protocols = ("TCP", "UDP")
    meta = {"name": _NAME, "namespace": "default"}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": meta,
                "spec": {
                    "clusterIP": _VIP,
                    "ports": [
                        {
                            "name": protocol.lower(),
                            "protocol": protocol,
                            "port": _SERVICE_PORT,
                            "targetPort": _ECHO_PORT,
                        }
                        for protocol in protocols
                    ],
                },
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": meta | {"labels": {"kubernetes.io/service-name": _NAME}},
                "addressType": "IPv4",
                "ports": [
                    {"name": protocol.lower(), "protocol": protocol, "port": _ECHO_PORT}
                    for protocol in protocols
                ],
                "endpoints": [{"addresses": [backend], "conditions": {"ready": True}}],
            },
        ],
    }


def _wait_until_it_serves(
    built: Topology, proxy: "subprocess.Popen[bytes]", log: IO[bytes]
) -> None:
    """Wait until the proxy answers its admin socket, which it does once the rules are in."""
    deadline = time.monotonic() + _START_S
    while proxy.poll() is None and time.monotonic() < deadline:
        try:
            status = _status(built)
        except NfqproxyError:
            time.sleep(0.02)  # it does not listen yet
            continue
        if all(worker["ready"] for worker in status["workers"]):
            return
        time.sleep(0.02)
    log.flush()
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()
    how = (
        f"did not serve within {_START_S:.0f} s"
        if proxy.poll() is None
        else f"ended with status {proxy.returncode} when started"
    )
    raise _SelfTestError(f"nfqproxy run {how}; it said: {said[-1] if said else 'nothing'}")


def _status(built: Topology) -> dict[str, Any]:
    return built.node.namespace.call(lambda: admin.ask("status"))


def _exercise(built: Topology) -> None:
    before = _packets(built)
    client = built.client.namespace
    for seen, protocol, kind in (
        (1, Protocol.TCP, socket.SOCK_STREAM),
        (2, Protocol.UDP, socket.SOCK_DGRAM),
    ):
        with client.socket(socket.AF_INET, kind) as flow:
            flow.settimeout(_ANSWER_S)
            try:
                flow.connect((_VIP, _SERVICE_PORT))
                _talk(flow, protocol)
            except (OSError, ValueError) as error:
                raise _SelfTestError(
                    f"the {protocol.name} exchange with {_VIP}:{_SERVICE_PORT} failed: {error}"
                    f" (packets seen by userspace so far: {_packets(built) - before})"
                ) from None
            _check_entry(built, flow.getsockname(), protocol)
        counted = _packets(built) - before
        if counted != seen:
            raise _SelfTestError(
                f"userspace saw {counted - seen + 1} packets of the {protocol.name} flow; it must"
                " be 1, the rest belongs in the kernel"
            )


def _talk(flow: socket.socket, protocol: Protocol) -> None:
    """Several messages there and back; ValueError for an answer that is not our backend's."""
    if protocol is Protocol.TCP:
        with flow.makefile("rwb") as stream:
            _check_backend(stream.readline())
            for number in range(_EXCHANGES):
                line = b"message %d\n" % number
                stream.write(line)
                stream.flush()
                if stream.readline() != line:
                    raise ValueError("the answer is not what was sent")
        return
    for number in range(_EXCHANGES):
        flow.send(b"message %d" % number)
        _check_backend(flow.recv(4096))


def _check_backend(answer: bytes) -> None:
    if not answer:
        raise ValueError("the connection ended before the backend spoke")
    name = json.loads(answer)["backend"]
    if name != _NAME:
        raise ValueError(f"another server answered ({name})")


def _packets(built: Topology) -> int:
    return sum(worker["packets"] for worker in _status(built)["workers"])


def _check_entry(built: Topology, client: tuple[str, int], protocol: Protocol) -> None:
    """The node's conntrack must hold the flow, translated to the backend."""
    original = ctnetlink.Tuple(
        ip_address(client[0]).packed,
        ip_address(_VIP).packed,
        int(protocol),
        client[1],
        _SERVICE_PORT,
    )

    def find() -> ctnetlink.Entry | None:
        connections = ConntrackSocket()
        try:
            return connections.find(original)
        finally:
            connections.close()

    entry = built.node.namespace.call(find)
    backend = ctnetlink.Nat(ip_address(built.pods[0].address4).packed, _ECHO_PORT)
    if entry is None:
        raise _SelfTestError(f"conntrack holds no entry for the {protocol.name} flow")
    if not entry.is_dnat or entry.destination != backend:
        raise _SelfTestError(f"the conntrack entry of the {protocol.name} flow has no NAT")
