"""Manifests of many Services on disk: what a user gives to ``nfqproxy run --manifests``.

The same objects, as a directory with one YAML file per Service or as one file with all of them. Most
Services have endpoints that nobody serves; the first, the middle one and the last are *probes*, whose only
endpoint is a pod that answers, and can be another one from one moment to the next.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bench.manifests import manifest_list
from bench.services import BACKEND_PORT, PORT, Endpoint, ServicePort
from bench.world import NODE_ADDRESS, NODE_NAME
from nfqproxy.errors import InputError

MAX_SERVICES = 60_000
"""What fits 10.96.0.0/16."""

_FIRST_VIP = (10 << 24) + (96 << 16) + 256
_FIRST_ENDPOINT = (10 << 24) + (244 << 16) + (16 << 8)
_ENDPOINTS = 240 * 256
"""10.244.16.0 to 10.244.255.255; then addresses come again, in other Services."""


class Source(Enum):
    """How the manifests lie on disk."""

    DIRECTORY = "directory"
    """A YAML file per Service."""
    FILE = "file"
    """All in one YAML file."""
    FILE_JSON = "file-json"
    """All in one JSON file."""
    KUBERNETES = "kubernetes"
    """A YAML file per Service, which an API server serves."""

    @property
    def is_directory(self) -> bool:
        """Whether each Service has a file of its own."""
        return self in (Source.DIRECTORY, Source.KUBERNETES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFiles:
    """``services`` Services with ``endpoints`` endpoints each (a probe has one), for one directory."""

    directory: Path
    source: Source
    services: int
    endpoints: int

    @property
    def path(self) -> Path:
        """What is given to ``--manifests``."""
        if self.source.is_directory:
            return self.directory / "manifests"
        suffix = "json" if self.source is Source.FILE_JSON else "yaml"
        return self.directory / f"manifests.{suffix}"

    @property
    def probes(self) -> list[str]:
        """Virtual addresses of the probes."""
        return [vip(number) for number in sorted(self._probe_numbers())]

    def write(self, pod: str) -> None:
        """All manifests, the probes served by ``pod``; :class:`InputError` if there is no room."""
        if not 1 <= self.services <= MAX_SERVICES:
            raise InputError(f"{self.services} Services: the bench holds 1 to {MAX_SERVICES}")
        if not self.source.is_directory:
            self.path.write_text(self._everything(pod, pod))
            return
        self.path.mkdir()
        (self.path / "node.yaml").write_text(_NODE_YAML)
        for number in range(self.services):
            self._file(number).write_text(_yaml(self._service(number, pod)))

    def prepare_change(self, pod: str, *, others: str) -> "Change":
        """The last probe's endpoint becomes ``pod``: written aside, to be put in place at once.

        ``others``: the pod of the other probes, as they were written.
        """
        last = self.services - 1
        aside = self.directory / "next"
        if self.source.is_directory:
            aside.write_text(_yaml(self._service(last, pod)))
            return Change(aside, self._file(last))
        aside.write_text(self._everything(others, pod))
        return Change(aside, self.path)

    def _file(self, number: int) -> Path:
        return self.path / f"service-{number:05}.yaml"

    def _probe_numbers(self) -> set[int]:
        return {0, self.services // 2, self.services - 1}

    def _service(self, number: int, pod: str) -> ServicePort:
        addresses = [pod]
        if number not in self._probe_numbers():
            first = number * self.endpoints
            addresses = [
                _dotted(_FIRST_ENDPOINT + (first + index) % _ENDPOINTS)
                for index in range(self.endpoints)
            ]
        return ServicePort(
            name=service_name(number),
            address=vip(number),
            port=PORT,
            endpoints=tuple(Endpoint(address=each, port=BACKEND_PORT) for each in addresses),
        )

    def _everything(self, pod: str, last_pod: str) -> str:
        services = [self._service(number, pod) for number in range(self.services - 1)]
        services.append(self._service(self.services - 1, last_pod))
        if self.source is Source.FILE_JSON:
            return manifest_list(services)
        return "---\n".join([_NODE_YAML, *map(_yaml, services)])


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is to take another's place."""

    prepared: Path
    target: Path

    def apply(self) -> None:
        """By rename(2), which is atomic: a reader meets the old or the new."""
        self.prepared.replace(self.target)

    def finish(self) -> None:
        """Nothing is left to do."""


def service_name(number: int) -> str:
    """Name of a Service; its only slice is called so with ``-1`` behind it."""
    return f"service-{number:05}"


def vip(number: int) -> str:
    """Cluster IP of a Service."""
    return _dotted(_FIRST_VIP + number)


def _dotted(number: int) -> str:
    return ".".join(str(byte) for byte in number.to_bytes(4))


def _yaml(service: ServicePort) -> str:
    endpoints = "".join(
        f"- addresses: [{each.address}]\n  conditions: {{ready: true}}\n  nodeName: {NODE_NAME}\n"
        for each in service.endpoints
    )
    return _SERVICE_YAML.format(name=service.name, vip=service.address, endpoints=endpoints)


_NODE_YAML = f"""\
apiVersion: v1
kind: Node
metadata:
  name: {NODE_NAME}
status:
  addresses:
  - type: InternalIP
    address: {NODE_ADDRESS}
"""
_SERVICE_YAML = f"""\
apiVersion: v1
kind: Service
metadata:
  name: {{name}}
  namespace: default
spec:
  type: ClusterIP
  clusterIP: {{vip}}
  clusterIPs: [{{vip}}]
  ipFamilies: [IPv4]
  ports:
  - name: http
    protocol: TCP
    port: {PORT}
    targetPort: {BACKEND_PORT}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {{name}}-1
  namespace: default
  labels:
    kubernetes.io/service-name: {{name}}
addressType: IPv4
ports:
- name: http
  protocol: TCP
  port: {BACKEND_PORT}
endpoints:
{{endpoints}}"""
