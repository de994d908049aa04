"""What following an API server costs the supervisor: ``python -m bench source``.

A test API server in a process of its own holds Services and EndpointSlices with all the metadata that a
controller writes; a fresh process starts the Kubernetes source, waits until every informer has synced and builds
the service table. Times begin with everything of the proxy imported but the source. ``list`` is wall time from
there to the first sync, the server's own work included, for which it has no CPU to itself; ``cpu`` is the
follower's alone, the import of the official client included. ``table`` is building the service table.
Memory is resident (VmRSS): ``source`` what the sync has added, ``all`` with the table, ``peak`` the most
there ever was (VmHWM), in which the answer being read stands beside what was made of it.
"""

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from bench.process import memory
from bench.services import BACKEND_PORT, PORT
from bench.world import NODE_NAME

_MOST_ENDPOINTS = 100
"""Of one slice, as the EndpointSlice controller makes them."""
_START_LIMIT_S = 300.0
_NODES = 500


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One start."""

    services: int
    endpoints: int
    list_s: float
    cpu_s: float
    table_s: float
    source_bytes: int
    all_bytes: int
    peak_bytes: int


@click.command("source")
@click.option("--services", type=click.IntRange(1, 60_000), default=5000, show_default=True)
@click.option(
    "--endpoints", type=click.IntRange(0), default=3, show_default=True, help="Of each Service."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("-o", "output", type=click.Choice(["text", "json"]), default="text")
def source_command(services: int, endpoints: int, rounds: int, output: str) -> None:
    """Time and memory of the Kubernetes source until it has synced. Needs no root.

    \b
    Example:
      python -m bench source --services 2500 --endpoints 100
    """
    context = multiprocessing.get_context("spawn")
    found = []
    with _server(services, endpoints) as kubeconfig:
        for _ in range(rounds):
            with ProcessPoolExecutor(1, mp_context=context) as fresh:
                found.append(fresh.submit(_measure, kubeconfig).result())
    if output == "json":
        click.echo(json.dumps([msgspec.to_builtins(each) for each in found], indent=1))
        return
    table = Table("services", "endpoints", "list s", "cpu s", "table s", "source MB", "all", "peak")
    for each in found:
        sizes = (each.source_bytes, each.all_bytes, each.peak_bytes)
        table.add_row(
            *(f"{count:,}" for count in (each.services, each.endpoints)),
            *(f"{seconds:.2f}" for seconds in (each.list_s, each.cpu_s, each.table_s)),
            *(f"{size / 2**20:.1f}" for size in sizes),
        )
    Console(width=100).print(table)


def _measure(kubeconfig: str) -> Measured:
    import nfqproxy.app  # what the supervisor holds anyway
    from nfqproxy.control.cluster import ClusterState
    from nfqproxy.sources.kubernetes.client import Access
    from nfqproxy.sources.kubernetes.source import KubernetesSource

    assert nfqproxy.app

    async def run() -> Measured:
        before = memory(os.getpid(), "VmRSS")
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        source = KubernetesSource(Access(kubeconfig=kubeconfig), node_name=NODE_NAME)
        try:
            objects = await source.start()
            list_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
            after = memory(os.getpid(), "VmRSS")
            cluster = ClusterState(NODE_NAME)
            began_s = time.monotonic()
            cluster.replace(objects)
            return Measured(
                services=len(objects.services),
                endpoints=sum(len(each.endpoints) for each in objects.endpoint_slices),
                list_s=list_s,
                cpu_s=cpu_s,
                table_s=time.monotonic() - began_s,
                source_bytes=after - before,
                all_bytes=memory(os.getpid(), "VmRSS"),
                peak_bytes=memory(os.getpid(), "VmHWM"),
            )
        finally:
            await source.close()

    return asyncio.run(run())


@contextmanager
def _server(services: int, endpoints: int) -> Iterator[str]:
    """Path of the kubeconfig of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="nfqb-source-") as directory:
        kubeconfig = str(Path(directory, "kubeconfig"))
        process = context.Process(
            target=_serve, args=(services, endpoints, kubeconfig, theirs), daemon=True
        )
        process.start()
        try:
            if not ours.poll(_START_LIMIT_S):
                raise TimeoutError("the test API server does not start")
            ours.recv()
            yield kubeconfig
        finally:
            process.terminate()
            process.join()


def _serve(services: int, endpoints: int, kubeconfig: str, ready: Connection) -> None:
    from nfqproxy.testing import ApiServer, write_kubeconfig
    from nfqproxy.testing.resources import by_kind

    async def run() -> None:
        async with ApiServer() as server:
            for number in range(services):
                for value in _objects(number, endpoints):
                    # As they are: what the server would default is there already.
                    resource = by_kind[str(value["apiVersion"]), str(value["kind"])]
                    server.store.put(resource, value)
            write_kubeconfig(Path(kubeconfig), server)
            ready.send(True)
            await asyncio.Event().wait()

    asyncio.run(run())


def _objects(number: int, endpoints: int) -> Iterator[dict[str, object]]:
    name = f"service-{number:05}"
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, "kubectl-client-side-apply"),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": _dotted((10 << 24) + (96 << 16) + number + 1),
            "clusterIPs": [_dotted((10 << 24) + (96 << 16) + number + 1)],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": "http"}],
            "selector": {"app": name},
            "sessionAffinity": "None",
        },
        "status": {"loadBalancer": {}},
    }
    for first in range(0, endpoints, _MOST_ENDPOINTS):
        labels = {
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": name,
        }
        metadata = _metadata(f"{name}-{first:05}", "kube-controller-manager")
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": BACKEND_PORT}],
            "endpoints": [
                _endpoint(name, number * endpoints + index)
                for index in range(first, min(first + _MOST_ENDPOINTS, endpoints))
            ],
        }


def _endpoint(service: str, number: int) -> dict[str, object]:
    return {
        "addresses": [_dotted((10 << 24) + (128 << 16) + number % (1 << 22))],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{number % _NODES}",
        "zone": f"zone-{number % 3}",
        "targetRef": {
            "kind": "Pod",
            "namespace": "default",
            "name": f"{service}-7d9c5b8f4-{number:07}",
            "uid": f"{number:08x}-0000-4000-8000-000000000000",
        },
    }


def _metadata(name: str, manager: str) -> dict[str, object]:
    fields = {"f:metadata": {"f:labels": {".": {}}}, "f:spec": {"f:ports": {}, "f:type": {}}}
    return {
        "name": name,
        "namespace": "default",
        "uid": "12345678-0000-4000-8000-000000000000",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [
            {
                "manager": manager,
                "operation": "Update",
                "apiVersion": "v1",
                "time": "2026-01-01T00:00:00Z",
                "fieldsType": "FieldsV1",
                "fieldsV1": fields,
            }
        ],
    }


def _dotted(number: int) -> str:
    return ".".join(str(byte) for byte in number.to_bytes(4))
