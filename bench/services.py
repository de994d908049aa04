"""The Services a contender serves: the measured one, among as many others as the table shall hold."""

from dataclasses import dataclass

from nfqproxy.errors import InputError

VIP = "10.96.0.10"
PORT = 80
BACKEND_PORT = 8080
MAX_SERVICES = 16_000
"""What fits the address plan: three endpoints each, in 10.244.2.0 to 10.244.255.255."""

_ENDPOINTS = 3
_FIRST_VIP = (10 << 24) + (96 << 16) + (1 << 8)
_FIRST_ENDPOINT = (10 << 24) + (244 << 16) + (2 << 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint of a Service port."""

    address: str
    port: int
    weight: int = 1

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """A ClusterIP Service with one port."""

    namespace: str = "default"
    name: str
    port_name: str = "http"
    protocol: str = "tcp"
    """``tcp`` or ``udp``."""
    address: str
    port: int
    endpoints: tuple[Endpoint, ...]


def table(measured: ServicePort, services: int) -> tuple[ServicePort, ...]:
    """``services`` Services with the measured one in their middle.

    In the middle, because kube-proxy's iptables mode looks at one Service after the other: there a
    packet meets as many rules as the average one. The others are TCP, with three endpoints each
    that nobody calls. Raises :class:`InputError` if they do not fit the address plan.
    """
    if not 1 <= services <= MAX_SERVICES:
        raise InputError(f"{services} Services: the bench's address plan holds 1 to {MAX_SERVICES}")
    others = [_other(number) for number in range(services - 1)]
    middle = len(others) // 2
    return (*others[:middle], measured, *others[middle:])


def _other(number: int) -> ServicePort:
    first = _FIRST_ENDPOINT + number * _ENDPOINTS
    return ServicePort(
        name=f"other-{number:05}",
        address=_dotted(_FIRST_VIP + number),
        port=PORT,
        endpoints=tuple(
            Endpoint(address=_dotted(first + index), port=BACKEND_PORT)
            for index in range(_ENDPOINTS)
        ),
    )


def _dotted(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
