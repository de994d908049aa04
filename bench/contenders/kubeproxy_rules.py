"""The rules kube-proxy v1.30 writes for ClusterIP Services, without kube-proxy.

Both modes, IPv4, with a cluster CIDR: the same chains and rules in the same order under the same
hashed names (k8s.io/kubernetes pkg/proxy/iptables/proxier.go and pkg/proxy/nftables/proxier.go,
v1.30). The texts have the form in which ``iptables-save`` and ``nft list ruleset`` print them, and a
unit test holds them equal to what a real kube-proxy wrote for the same Services. kube-proxy itself
takes its Services in the order of a Go map, that is in none; here the caller gives the order.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from bench.services import Endpoint, ServicePort


def _hash(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:length]


# ------------------------------------------------------------------------------------- iptables

_MANGLE = """*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"""

_NEW = "-m conntrack --ctstate NEW -m comment --comment"
_FILTER = f"""*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT {_NEW} "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD {_NEW} "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD {_NEW} "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT {_NEW} "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \
"block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 \
-j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack \
--ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""

_NAT_HOOKS = """-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" \
-j MASQUERADE --random-fully
"""
_NAT_LAST = (
    '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the '
    'last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n'
)
_NAT_CHAINS = ("KUBE-MARK-MASQ", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-PROXY-CANARY")


def iptables_rules(services: Sequence[ServicePort], cluster_cidr: str) -> str:
    """Tables mangle, filter and nat for ``iptables-restore``; KUBE-SERVICES in the given order."""
    chains: dict[str, list[str]] = {}
    portals: list[str] = []
    for service in services:
        chain = _service_chain(service)
        what = f"{service.namespace}/{service.name}:{service.port_name}"
        match = (
            f"-d {service.address}/32 -p {service.protocol} -m comment "
            f'--comment "{what} cluster IP" -m {service.protocol} --dport {service.port}'
        )
        portals.append(f"-A KUBE-SERVICES {match} -j {chain}\n")
        chains[chain] = [f"-A {chain} ! -s {cluster_cidr} {match} -j KUBE-MARK-MASQ\n"]
        for index, endpoint in enumerate(service.endpoints):
            target = _endpoint_chain(service, endpoint)
            chance = _chance(len(service.endpoints) - index)
            chains[chain].append(
                f'-A {chain} -m comment --comment "{what} -> {endpoint}"{chance} -j {target}\n'
            )
            chains[target] = [
                f'-A {target} -s {endpoint.address}/32 -m comment --comment "{what}" '
                "-j KUBE-MARK-MASQ\n",
                f'-A {target} -p {service.protocol} -m comment --comment "{what}" '
                f"-m {service.protocol} -j DNAT --to-destination {endpoint}\n",
            ]
    names = sorted((*_NAT_CHAINS, "KUBE-SERVICES", *chains))
    nat = [
        "*nat\n",
        *(f":{hook} ACCEPT [0:0]\n" for hook in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
        *(f":{name} - [0:0]\n" for name in names),
        _NAT_HOOKS,
    ]
    for name in sorted(chains):
        if name.startswith("KUBE-SEP-"):
            nat += chains[name]
    nat += [*portals, _NAT_LAST]
    for name in sorted(chains):
        if name.startswith("KUBE-SVC-"):
            nat += chains[name]
    return "".join([_MANGLE, _FILTER, *nat, "COMMIT\n"])


def _service_chain(service: ServicePort) -> str:
    return "KUBE-SVC-" + _hash(_port_name(service), 16)


def _endpoint_chain(service: ServicePort, endpoint: Endpoint) -> str:
    return "KUBE-SEP-" + _hash(f"{_port_name(service)}{endpoint}", 16)


def _port_name(service: ServicePort) -> str:
    return f"{service.namespace}/{service.name}:{service.port_name}{service.protocol}"


def _chance(left: int) -> str:
    """The match of one endpoint of those that are ``left``: 1/left, none for the last.

    As iptables prints it back: the kernel holds a probability in steps of 2**-31 (xt_statistic).
    """
    if left == 1:
        return ""
    probability = round(2**31 / left) / 2**31
    return f" -m statistic --mode random --probability {probability:.11f}"


# ------------------------------------------------------------------------------------- nftables

_NFT_BASE = """	chain filter-prerouting {
		type filter hook prerouting priority dstnat - 10; policy accept;
		ct state new jump firewall-check
	}

	chain filter-input {
		type filter hook input priority -110; policy accept;
		ct state new jump nodeport-endpoints-check
		ct state new jump service-endpoints-check
	}

	chain filter-forward {
		type filter hook forward priority -110; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}

	chain filter-output {
		type filter hook output priority -110; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump firewall-check
	}

	chain filter-output-post-dnat {
		type filter hook output priority -90; policy accept;
		ct state new jump cluster-ips-check
	}

	chain nat-prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump services
	}

	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}

	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		jump masquerading
	}

	chain nodeport-endpoints-check {
		ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
	}

	chain service-endpoints-check {
		ip daddr . meta l4proto . th dport vmap @no-endpoint-services
	}

	chain firewall-check {
		ip daddr . meta l4proto . th dport vmap @firewall-ips
	}

	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}

	chain masquerading {
		meta mark & 0x00004000 == 0x00000000 return
		meta mark set meta mark ^ 0x00004000
		masquerade fully-random
	}

	chain cluster-ips-check {
		ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
	}

	chain mark-for-masquerade {
		meta mark set meta mark | 0x00004000
	}

	chain reject-chain {
		comment "helper for @no-endpoint-services / @no-endpoint-nodeports"
		reject
	}
"""

_ADDRESS_KEY = "ipv4_addr . inet_proto . inet_service : verdict"
_PORT_KEY = "inet_proto . inet_service : verdict"


def nftables_rules(services: Sequence[ServicePort], cluster_cidr: str, node_address: str) -> str:
    """The table ``ip kube-proxy`` for ``nft -f``; chains of Services in the given order."""
    portals = [
        f"{service.address} . {service.protocol} . {service.port} : goto {_nft_service(service)}"
        for service in services
    ]
    addresses = dict.fromkeys(service.address for service in services)
    no_endpoint = "vmap to drop or reject packets to service{}s with no endpoints"
    ranges = "destinations that are subject to LoadBalancerSourceRanges"
    frontends = "ClusterIP, ExternalIP and LoadBalancer IP traffic"
    sets = [
        _set("set cluster-ips", "ipv4_addr", "Active ClusterIPs", addresses),
        _set("set nodeport-ips", "ipv4_addr", "IPs that accept NodePort traffic", [node_address]),
        _set("map no-endpoint-services", _ADDRESS_KEY, no_endpoint.format("")),
        _set("map no-endpoint-nodeports", _PORT_KEY, no_endpoint.format(" nodeport")),
        _set("map firewall-ips", _ADDRESS_KEY, ranges),
        _set("map service-ips", _ADDRESS_KEY, frontends, portals),
        _set("map service-nodeports", _PORT_KEY, "NodePort traffic"),
    ]
    chains = [chain for service in services for chain in _nft_chains(service, cluster_cidr)]
    blocks = "\n".join([*sets, _NFT_BASE, *chains])
    return f'table ip kube-proxy {{\n\tcomment "rules for kube-proxy"\n{blocks}}}\n'


def _set(kind_and_name: str, key: str, comment: str, elements: Iterable[str] = ()) -> str:
    listed = ",\n\t\t\t     ".join(elements)
    held = f"\t\telements = {{ {listed} }}\n" if listed else ""
    return f'\t{kind_and_name} {{\n\t\ttype {key}\n\t\tcomment "{comment}"\n{held}\t}}\n'


def _nft_chains(service: ServicePort, cluster_cidr: str) -> list[str]:
    targets = [_nft_endpoint(service, endpoint) for endpoint in service.endpoints]
    chains = [
        f"\tchain {target} {{\n"
        f"\t\tip saddr {endpoint.address} jump mark-for-masquerade\n"
        f"\t\tmeta l4proto {service.protocol} dnat to {endpoint}\n\t}}\n"
        for target, endpoint in zip(targets, service.endpoints, strict=True)
    ]
    numbered = ", ".join(f"{index} : goto {target}" for index, target in enumerate(targets))
    chains.append(
        f"\tchain {_nft_service(service)} {{\n"
        f"\t\tip daddr {service.address} {service.protocol} dport {service.port} "
        f"ip saddr != {cluster_cidr} jump mark-for-masquerade\n"
        f"\t\tnumgen random mod {len(targets)} vmap {{ {numbered} }}\n\t}}\n"
    )
    return chains


def _nft_name(service: ServicePort) -> str:
    return f"{service.namespace}/{service.name}/{service.protocol}/{service.port_name}"


def _nft_service(service: ServicePort) -> str:
    name = _nft_name(service)
    return f"service-{_hash(name, 8)}-{name}"


def _nft_endpoint(service: ServicePort, endpoint: Endpoint) -> str:
    name = f"{_nft_name(service)}__{endpoint.address}/{endpoint.port}"
    return f"endpoint-{_hash(name, 8)}-{name}"
