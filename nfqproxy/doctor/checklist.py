"""All questions, in the order in which a person would mend what they find."""

from collections.abc import Sequence
from functools import partial

from nfqproxy.doctor import abilities, neighbours, network, program
from nfqproxy.doctor.check import Check
from nfqproxy.doctor.self_test import self_test
from nfqproxy.kernel.rule_settings import RuleSettings

__all__ = ["checklist"]


def checklist(settings: RuleSettings, service_networks: Sequence[str] = ()) -> list[Check]:
    """The checks for a proxy that would run with ``settings`` in this network namespace.

    ``service_networks``: the cluster's Service networks (CIDR), if they are known.
    """
    marks = settings.marks
    # What the data path ``mark`` can do without.
    insert = Check(
        id="ctnetlink",
        title="conntrack with NAT",
        ask=abilities.conntrack_insert,
        is_essential=True,
    )
    udp_timeout = Check(
        id="udp-timeout",
        title="UDP time-outs",
        ask=partial(network.udp_timeout, settings.flow_timeout_s),
    )
    return [
        Check(id="privileges", title="privileges", ask=program.capabilities),
        *(
            Check(id=f"tool-{name}", title=f"tool {name}", ask=program.tool(name))
            for name in program.TOOLS
        ),
        Check(id="python", title="Python", ask=program.python),
        Check(id="netfilterqueue", title="netfilterqueue", ask=program.netfilterqueue),
        Check(id="kernel", title="kernel", ask=program.kernel_version),
        Check(
            id="rules",
            title="rules and sets",
            ask=partial(abilities.rules, settings),
            is_essential=True,
        ),
        Check(
            id="nfqueue",
            title="NFQUEUE",
            ask=partial(abilities.queue_bind, settings),
            is_essential=True,
        ),
        *([] if marks else [insert]),
        Check(
            id="queue-numbers",
            title="queue numbers",
            ask=partial(neighbours.queue_numbers, settings),
        ),
        Check(id="iptables-backends", title="iptables back ends", ask=neighbours.iptables_mixture),
        Check(id="kube-proxy", title="kube-proxy", ask=partial(neighbours.kube_proxy, settings)),
        *(
            [
                Check(
                    id="packet-marks",
                    title="packet marks",
                    ask=partial(neighbours.packet_marks, marks),
                )
            ]
            if marks
            else []
        ),
        Check(id="conntrack-room", title="room in conntrack", ask=network.conntrack_room),
        *([] if marks else [udp_timeout]),
        Check(id="forwarding", title="IP forwarding", ask=network.forwarding),
        Check(id="rp-filter", title="reverse path filter", ask=network.reverse_path_filter),
        Check(
            id="service-route",
            title="route to Services",
            ask=partial(
                network.service_route,
                service_networks or network.DEFAULT_SERVICE_NETWORKS,
                are_named=bool(service_networks),
            ),
        ),
        Check(
            id="self-test",
            title="live self-test",
            ask=partial(self_test, settings),
            is_essential=True,
        ),
    ]
