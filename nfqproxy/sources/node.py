"""v1 Node and networking.k8s.io/v1 ServiceCIDR: from the API's shapes to the objects."""

from nfqproxy.control.objects import Node, ServiceCidr
from nfqproxy.sources import fields
from nfqproxy.sources.manifest import NodeManifest, ServiceCidrManifest
from nfqproxy.sources.schema import FieldError


def node(manifest: NodeManifest, context: fields.Context) -> Node:
    """The Node; raises FieldError."""
    name, _, labels = fields.identity(manifest.metadata, namespaced=False)
    spec, status = manifest.spec, manifest.status
    cidrs: tuple[str, ...] = ()
    if spec is not None and spec.pod_cidrs:
        cidrs = fields.cidrs("spec.podCIDRs", spec.pod_cidrs)
    elif spec is not None and spec.pod_cidr:
        cidrs = (fields.cidr("spec.podCIDR", spec.pod_cidr),)
    by_type: dict[str, list[str]] = {"InternalIP": [], "ExternalIP": []}
    for index, entry in enumerate((status.addresses if status is not None else None) or ()):
        if entry.type in by_type:
            address = fields.ip(f"status.addresses[{index}].address", entry.address or "")
            by_type[entry.type].append(address)
    return Node(
        name=name,
        origin=context.origin,
        labels=labels,
        pod_cidrs=cidrs,
        internal_ips=tuple(dict.fromkeys(by_type["InternalIP"])),
        external_ips=tuple(dict.fromkeys(by_type["ExternalIP"])),
        taints=tuple(taint.key for taint in (spec.taints if spec else None) or () if taint.key),
        deleting=manifest.metadata is not None and manifest.metadata.deletion_timestamp is not None,
    )


def service_cidr(manifest: ServiceCidrManifest, context: fields.Context) -> ServiceCidr:
    """The ServiceCIDR; raises FieldError."""
    name, _, _ = fields.identity(manifest.metadata, namespaced=False)
    cidrs = manifest.spec.cidrs if manifest.spec is not None else None
    if not cidrs:
        raise FieldError("spec.cidrs", "is missing; give the ranges of cluster addresses")
    return ServiceCidr(name=name, origin=context.origin, cidrs=fields.cidrs("spec.cidrs", cidrs))
