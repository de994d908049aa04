"""discovery.k8s.io/v1 EndpointSlice: from the API's shape to the object."""

import logging
import sys

from nfqproxy.control import annotations as names
from nfqproxy.control.address import canonical_ip, family_of
from nfqproxy.control.objects import EndpointSlice, SliceEndpoint, SlicePort
from nfqproxy.model import Family
from nfqproxy.sources import fields
from nfqproxy.sources.manifest import EndpointOfSlice, EndpointSliceManifest, ForZone
from nfqproxy.sources.schema import FieldError, one_of

logger = logging.getLogger(__name__)

SERVICE_NAME_LABEL = "kubernetes.io/service-name"


def endpoint_slice(
    manifest: EndpointSliceManifest, context: fields.Context
) -> EndpointSlice | None:
    """The object, None for addressType FQDN; raises FieldError."""
    name, namespace, labels = fields.identity(manifest.metadata, namespaced=True)
    if not manifest.address_type:
        raise FieldError("addressType", "is missing; write IPv4 or IPv6")
    address_type = one_of("addressType", manifest.address_type, ("IPv4", "IPv6", "FQDN"))
    if address_type == "FQDN":
        context.tell(
            logger,
            logging.INFO,
            f"EndpointSlice {namespace}/{name} is of addressType FQDN, which the proxy does not use",
        )
        return None
    family = Family.IPV4 if address_type == "IPv4" else Family.IPV6
    own = fields.own_annotations(manifest.metadata, names.ON_ENDPOINT_SLICE, strict=context.strict)
    service = labels.get(SERVICE_NAME_LABEL, "")
    if not service:
        context.tell(
            logger,
            logging.WARNING,
            f"EndpointSlice {namespace}/{name} has no label {SERVICE_NAME_LABEL}"
            " and belongs to no Service",
        )
    return EndpointSlice(
        namespace=namespace,
        name=name,
        origin=context.origin,
        service=service,
        family=family,
        ports=_slice_ports(manifest, f"{namespace}/{name}", context),
        endpoints=tuple(
            _slice_endpoint(index, endpoint, family)
            for index, endpoint in enumerate(manifest.endpoints or ())
        ),
        weight=fields.annotation(own, names.WEIGHT, names.parse_weight),
        labels=labels,
    )


def _slice_ports(
    manifest: EndpointSliceManifest, slice_name: str, context: fields.Context
) -> tuple[SlicePort, ...]:
    ports: list[SlicePort] = []
    for index, port in enumerate(manifest.ports or ()):
        protocol = fields.protocol(f"ports[{index}].protocol", port.protocol)
        number = fields.port(f"ports[{index}].port", port.port, 0)
        if port.name is None or number == 0:
            # kube-proxy ignores both (SEMANTICS 2.2); a cluster never shows a port without name,
            # because the API server writes an empty one.
            context.tell(
                logger,
                logging.WARNING,
                f"EndpointSlice {slice_name}: ports[{index}] has no "
                + (
                    'name and is ignored; write name: "" if the Service port has none'
                    if port.name is None
                    else "port number and is ignored"
                ),
            )
            continue
        ports.append(SlicePort(name=port.name, protocol=protocol, port=number))
    return tuple(ports)


def _slice_endpoint(index: int, endpoint: EndpointOfSlice, family: Family) -> SliceEndpoint:
    if not endpoint.addresses:
        raise FieldError(f"endpoints[{index}].addresses", "is empty; give one address")
    # All are checked, the first is used.
    addresses = [_ip_of(index, n, text, family) for n, text in enumerate(endpoint.addresses)]
    conditions, hints, target = endpoint.conditions, endpoint.hints, endpoint.target_ref
    return SliceEndpoint(
        address=addresses[0],
        ready=conditions is None or conditions.ready is not False,
        serving=conditions is None or conditions.serving is not False,
        terminating=conditions is not None and conditions.terminating is True,
        # The same few names again and again: kept once.
        node=sys.intern(endpoint.node_name) if endpoint.node_name else None,
        zone=sys.intern(endpoint.zone) if endpoint.zone else None,
        target_name=target.name if target is not None else None,
        zone_hints=_hints(hints.for_zones) if hints is not None else (),
        node_hints=_hints(hints.for_nodes) if hints is not None else (),
    )


def _hints(hints: list[ForZone] | None) -> tuple[str, ...]:
    return tuple(hint.name for hint in hints or () if hint.name)


def _ip_of(endpoint: int, index: int, text: str, family: Family) -> str:
    try:
        address = canonical_ip(text)
    except ValueError as error:
        raise FieldError(
            f"endpoints[{endpoint}].addresses[{index}]", f"{error}; write an address"
        ) from None
    if family_of(address) is not family:
        raise FieldError(
            f"endpoints[{endpoint}].addresses[{index}]",
            f"{address} is not of the slice's addressType IPv{int(family)}; move it to a slice "
            f"of addressType IPv{10 - int(family)}",
        )
    fields.check_ordinary(lambda: f"endpoints[{endpoint}].addresses[{index}]", address)
    return address
