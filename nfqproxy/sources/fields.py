"""The fields that several kinds share: names, annotations, ports, addresses, closed sets of words.

Each function takes the field's path for the :class:`~nfqproxy.sources.schema.FieldError` it raises.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from nfqproxy.control import annotations as names
from nfqproxy.control.address import canonical_cidr, canonical_ip
from nfqproxy.model import Protocol, TrafficPolicy
from nfqproxy.sources.manifest import ObjectMeta
from nfqproxy.sources.schema import FieldError, nearest, one_of

ValueT = TypeVar("ValueT")

_PROTOCOLS = {protocol.name: protocol for protocol in Protocol}
_POLICIES = {policy.value: policy for policy in TrafficPolicy}
_SPECIAL = {
    "the unspecified": r"(?:0\.0\.0\.0|::)$",
    "a loopback": r"127\.|::1$",
    "a link-local": r"169\.254\.|fe[89ab][0-9a-f]:",
    "a link-local multicast": r"224\.0\.0\.|ff02:",
}
_IS_SPECIAL = re.compile("|".join(f"({pattern})" for pattern in _SPECIAL.values()))
_NO_LABELS: Mapping[str, str] = {}
# RFC 1123 subdomain, which every name of these kinds obeys.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class Context(NamedTuple):
    """Where a document comes from and how it is to be read."""

    origin: str
    """File name, or what stands for it in messages."""
    strict: bool = True
    """Refuse unknown fields and annotations."""
    once: set[str] | None = None
    """What has been told and is not to be told again; None: everything is told."""

    def tell(self, logger: logging.Logger, level: int, sentence: str) -> None:
        """Log what is odd about an object but no fault."""
        if self.once is not None:
            if sentence in self.once:
                return
            self.once.add(sentence)
        logger.log(level, "%s: %s", self.origin, sentence)


def identity(
    metadata: ObjectMeta | None, *, namespaced: bool
) -> tuple[str, str, Mapping[str, str]]:
    """Name, namespace ("default" if none is given, empty for kinds without) and labels."""
    if metadata is None or not metadata.name:
        raise FieldError("metadata.name", "is missing; every object has a name")
    namespace = (metadata.namespace or "default") if namespaced else ""
    for field, value in (("name", metadata.name), ("namespace", namespace)):
        if value and _NAME.fullmatch(value) is None:
            raise FieldError(
                f"metadata.{field}",
                f'"{value}" is no Kubernetes name; use a-z, 0-9, "-" and "."',
            )
    return metadata.name, namespace, metadata.labels or _NO_LABELS


def own_annotations(
    metadata: ObjectMeta | None, known: frozenset[str], *, strict: bool
) -> Mapping[str, str]:
    """The nfqproxy.io/* annotations; strict refuses names unknown for this kind of object."""
    if metadata is None or not metadata.annotations:
        return _NO_LABELS
    own = {
        key: value for key, value in metadata.annotations.items() if key.startswith(names.PREFIX)
    }
    for key in own:
        if strict and key not in known:
            raise FieldError(_at(key), f"unknown annotation, {nearest(key, known)}")
    annotation(own, names.STEER, names.parse_steer)
    annotation(own, names.BALANCER_OPTIONS, names.parse_balancer_options)
    return own


def annotation(own: Mapping[str, str], name: str, parse: Callable[[str], ValueT]) -> ValueT | None:
    """The parsed value of an annotation, None where it is not given."""
    text = own.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise FieldError(_at(name), str(error)) from None


def _at(name: str) -> str:
    return f"metadata.annotations[{name}]"


def policy(path: str, value: str | None) -> TrafficPolicy:
    """A traffic policy, Cluster if none is given."""
    return _POLICIES[one_of(path, value, ("Cluster", "Local"))]


def protocol(path: str, value: str | None) -> Protocol:
    """A protocol, TCP if none is given."""
    return _PROTOCOLS[one_of(path, value, ("TCP", "UDP", "SCTP"))]


def port(path: str, value: int | None, lowest: int) -> int:
    """A port number from ``lowest`` to 65535, 0 if none is given."""
    number = 0 if value is None else value
    if not lowest <= number <= 65_535:
        raise FieldError(path, f"{number} is out of range; give {lowest} to 65535")
    return number


def ip(path: str, text: str) -> str:
    """An address in canonical form."""
    try:
        return canonical_ip(text)
    except ValueError as error:
        raise FieldError(path, f"{error}; write an IPv4 or IPv6 address") from None


def check_ordinary(path: Callable[[], str], address: str) -> None:
    """Refuse what the API server refuses for external IPs and endpoints, of which no cluster has any.

    (k8s.io/kubernetes/pkg/apis/core/validation: ValidateNonSpecialIP.) Such an address would take the
    node's own loopback or link-local traffic away, or send that of others there. Canonical form.
    """
    found = _IS_SPECIAL.match(address)
    if found is not None:
        assert found.lastindex is not None
        what = list(_SPECIAL)[found.lastindex - 1]
        raise FieldError(path(), f"{address} is {what} address; write one that is routed")


def addresses(path: str, texts: list[str] | None) -> tuple[str, ...]:
    """Addresses in canonical form, each once."""
    if not texts:
        return ()
    found = [ip(f"{path}[{index}]", text) for index, text in enumerate(texts)]
    return tuple(dict.fromkeys(found))


def cidr(path: str, text: str) -> str:
    """A CIDR in canonical form."""
    try:
        return canonical_cidr(text.strip())
    except ValueError as error:
        raise FieldError(path, f"{error}; write ADDRESS/BITS") from None


def cidrs(path: str, texts: list[str]) -> tuple[str, ...]:
    """CIDRs in canonical form, each once."""
    return tuple(dict.fromkeys(cidr(f"{path}[{index}]", text) for index, text in enumerate(texts)))
