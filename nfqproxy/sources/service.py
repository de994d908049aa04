"""v1 Service: from the API's shape to the object."""

import logging

from nfqproxy.control import annotations as names
from nfqproxy.control.address import canonical_cidr, family_of
from nfqproxy.control.objects import DEFAULT_AFFINITY_TIMEOUT_S, Service, ServicePortSpec
from nfqproxy.model import Protocol
from nfqproxy.sources import fields
from nfqproxy.sources.manifest import PortOfService, ServiceManifest, ServiceSpec, ServiceStatus
from nfqproxy.sources.schema import FieldError, one_of

logger = logging.getLogger(__name__)


def service(manifest: ServiceManifest, context: fields.Context) -> Service:
    """The object; raises FieldError."""
    name, namespace, labels = fields.identity(manifest.metadata, namespaced=True)
    if manifest.spec is None:
        raise FieldError("spec", "is missing; a Service has type, clusterIP and ports there")
    spec = manifest.spec
    kind = one_of("spec.type", spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"))
    cluster_ips = () if kind == "ExternalName" else _cluster_ips(spec)
    if kind != "ExternalName" and not cluster_ips and not _is_headless(spec):
        context.tell(
            logger,
            logging.WARNING,
            f"Service {namespace}/{name} has no spec.clusterIP and is left out; give it an address",
        )
    own = fields.own_annotations(manifest.metadata, names.ON_SERVICE, strict=context.strict)
    return Service(
        namespace=namespace,
        name=name,
        origin=context.origin,
        type=kind,
        cluster_ips=cluster_ips,
        ports=_service_ports(spec.ports or []),
        external_ips=_external_ips(spec),
        load_balancer_ips=_ingress_ips(manifest.status),
        load_balancer_source_ranges=_source_ranges(spec, f"{namespace}/{name}", context),
        internal_policy=fields.policy("spec.internalTrafficPolicy", spec.internal_traffic_policy),
        external_policy=fields.policy("spec.externalTrafficPolicy", spec.external_traffic_policy),
        affinity_timeout_s=_affinity_timeout(spec),
        health_check_node_port=fields.port(
            "spec.healthCheckNodePort", spec.health_check_node_port, 0
        ),
        labels=labels,
        annotations=own,
        weights=fields.annotation(own, names.WEIGHTS, names.parse_weights) or {},
    )


def _is_headless(spec: ServiceSpec) -> bool:
    return spec.cluster_ip == "None" or "None" in (spec.cluster_ips or ())


def _cluster_ips(spec: ServiceSpec) -> tuple[str, ...]:
    if _is_headless(spec):
        return ()
    if not spec.cluster_ips:
        return (fields.ip("spec.clusterIP", spec.cluster_ip),) if spec.cluster_ip else ()
    addresses = fields.addresses("spec.clusterIPs", spec.cluster_ips)
    if spec.cluster_ip and fields.ip("spec.clusterIP", spec.cluster_ip) != addresses[0]:
        raise FieldError("spec.clusterIPs[0]", f"must equal spec.clusterIP {spec.cluster_ip}")
    if len({family_of(address) for address in addresses}) != len(addresses):
        raise FieldError("spec.clusterIPs", "holds two addresses of one family; keep one of each")
    return addresses


def _service_ports(ports: list[PortOfService]) -> tuple[ServicePortSpec, ...]:
    decoded: list[ServicePortSpec] = []
    names: set[str] = set()
    numbers: set[tuple[int, Protocol]] = set()
    for index, port in enumerate(ports):
        at = f"spec.ports[{index}]"
        if port.port is None:
            raise FieldError(f"{at}.port", "is missing; give a number from 1 to 65535")
        spec = ServicePortSpec(
            name=port.name or "",
            protocol=fields.protocol(f"{at}.protocol", port.protocol),
            port=fields.port(f"{at}.port", port.port, 1),
            node_port=fields.port(f"{at}.nodePort", port.node_port, 0),
        )
        if isinstance(port.target_port, int):
            fields.port(f"{at}.targetPort", port.target_port, 0)
        if not spec.name and len(ports) > 1:
            raise FieldError(f"{at}.name", "is missing; a Service of several ports names each")
        if spec.name in names:
            raise FieldError(f"{at}.name", f'"{spec.name}" names an earlier port; choose another')
        if (spec.port, spec.protocol) in numbers:
            raise FieldError(
                f"{at}.port", f"{spec.port}/{spec.protocol.name} is an earlier port; remove one"
            )
        names.add(spec.name)
        numbers.add((spec.port, spec.protocol))
        decoded.append(spec)
    return tuple(decoded)


def _external_ips(spec: ServiceSpec) -> tuple[str, ...]:
    found = fields.addresses("spec.externalIPs", spec.external_ips)
    for address in found:
        fields.check_ordinary(lambda: "spec.externalIPs", address)
    return found


def _ingress_ips(status: ServiceStatus | None) -> tuple[str, ...]:
    if status is None or status.load_balancer is None:
        return ()
    found: list[str] = []
    for index, ingress in enumerate(status.load_balancer.ingress or ()):
        at = f"status.loadBalancer.ingress[{index}]"
        mode = one_of(f"{at}.ipMode", ingress.ip_mode, ("VIP", "Proxy"))
        if ingress.ip and mode == "VIP":
            found.append(fields.ip(f"{at}.ip", ingress.ip))
    return tuple(dict.fromkeys(found))


def _source_ranges(spec: ServiceSpec, service: str, context: fields.Context) -> tuple[str, ...]:
    """Those that parse (SEMANTICS 2.1.4); note that dropping them all opens the Service."""
    ranges: list[str] = []
    for index, text in enumerate(spec.load_balancer_source_ranges or ()):
        try:
            ranges.append(canonical_cidr(text.strip()))
        except ValueError as error:
            context.tell(
                logger,
                logging.WARNING,
                f"Service {service}: spec.loadBalancerSourceRanges[{index}]: {error};"
                " the entry is ignored",
            )
    return tuple(dict.fromkeys(ranges))


def _affinity_timeout(spec: ServiceSpec) -> int:
    affinity = one_of("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    config = spec.session_affinity_config
    given = config.client_ip.timeout_seconds if config and config.client_ip else None
    if given is not None and not 0 < given <= 86_400:
        raise FieldError(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            f"{given} is out of range; give 1 to 86400 seconds",
        )
    if affinity == "None":
        return 0
    return given if given is not None else DEFAULT_AFFINITY_TIMEOUT_S
