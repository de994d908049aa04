"""Records the real netlink messages that the codec tests read: ``python capture.py`` as root.

Three namespaces with random names, client - node - backend, removed at the end. On the node raw
sockets talk to nfnetlink_queue, ctnetlink and rtnetlink; what the kernel answers goes to
``messages.json`` beside this file, each datagram in hex with what the scenario did (``expect``):
addresses, ports and interface indexes as set up here, never as decoded by the code under test.
``--layout`` prints the order of the attributes in each queued packet.
"""

import ctypes
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nfqproxy.wire import ctnetlink, nfnetlink, nfqueue, nlmsg, rtnetlink

OUTPUT = Path(__file__).with_name("messages.json")
QUEUE = 7
CLONE_NEWNET = 0x40000000
SO_PRIORITY, SO_TIMESTAMP, SO_MARK = 12, 29, 36

CLIENT = {4: "192.0.2.10", 6: "2001:db8:2::10"}
NODE = {4: "192.0.2.1", 6: "2001:db8:2::1"}
POD_GATEWAY = {4: "10.244.1.1", 6: "fd00:10:244:1::1"}
BACKEND = {4: "10.244.1.10", 6: "fd00:10:244:1::10"}
VIP = {4: "10.96.0.1", 6: "fd00:10:96::1"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def sh(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Sockets opened in the block belong to the namespace for life."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = (
        os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/ns/net", f"/run/netns/{name}")
    )
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        yield
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


class Recorder:
    """Collects captures and writes them out."""

    def __init__(self) -> None:
        self.captures: list[dict[str, Any]] = []

    def add(self, name: str, data: bytes, **expect: Any) -> None:
        self.captures.append({"name": name, "expect": expect, "hex": data.hex()})


class Netlink:
    """A raw netlink socket of one namespace; a receive that takes over 5 s fails the run."""

    def __init__(
        self, namespace: str, protocol: int, *, cap: bool = True, ext: bool = True
    ) -> None:
        with inside(namespace):
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self.socket.bind((0, 0))
        self.socket.settimeout(5)
        self.socket.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_CAP_ACK, int(cap))
        self.socket.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_EXT_ACK, int(ext))

    def ask(self, request: bytes) -> bytes:
        self.socket.send(request)
        return self.receive()

    def receive(self) -> bytes:
        return self.socket.recv(1 << 17)

    def dump(self, request: bytes) -> list[bytes]:
        """All datagrams up to the one that ends with NLMSG_DONE."""
        self.socket.send(request)
        datagrams = [self.receive()]
        while not any(m.type == nlmsg.NLMSG_DONE for m in nlmsg.messages(datagrams[-1])):
            datagrams.append(self.receive())
        return datagrams

    def join(self, group: int) -> None:
        self.socket.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_ADD_MEMBERSHIP, group)


def build(client: str, node: str, backend: str) -> dict[str, int]:
    """Links, addresses, routes, rules; returns the node's interface indexes."""
    for name in (client, node, backend):
        sh(f"ip netns add {name}")
        sh(f"ip -n {name} link set lo up")
    sh(f"ip -n {node} link add front type veth peer name eth0 netns {client}")
    sh(f"ip -n {node} link add pods type veth peer name eth0 netns {backend}")
    for name, device, addresses in (
        (client, "eth0", ("192.0.2.10/24", "2001:db8:2::10/64")),
        (node, "front", ("192.0.2.1/24", "192.0.2.2/24", "2001:db8:2::1/64")),
        (node, "pods", ("10.244.1.1/24", "fd00:10:244:1::1/64")),
        (backend, "eth0", ("10.244.1.10/24", "fd00:10:244:1::10/64")),
    ):
        sh(f"ip -n {name} link set {device} up")
        for address in addresses:
            nodad = " nodad" if ":" in address else ""
            sh(f"ip -n {name} addr add {address} dev {device}{nodad}")
    for name, gateways in ((client, NODE), (backend, POD_GATEWAY)):
        sh(f"ip -n {name} route add default via {gateways[4]}")
        sh(f"ip -n {name} -6 route add default via {gateways[6]}")
    # The node's own connections to the VIP need some route before OUTPUT sees them (KERNEL 3).
    sh(f"ip -n {node} route add default via {BACKEND[4]}")
    sh(f"ip -n {node} -6 route add default via {BACKEND[6]}")
    run = f"ip netns exec {node}"
    sh(f"{run} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    sh(f"{run} sysctl -qw net.netfilter.nf_conntrack_acct=1")
    for version, tool in ((4, "iptables"), (6, "ip6tables")):
        for chain in ("PREROUTING", "OUTPUT"):
            rule = f"{run} {tool} -w -t raw -A {chain} -d {VIP[version]}"
            sh(f"{rule} -p tcp --syn -j NFQUEUE --queue-num {QUEUE}")
            sh(f"{rule} -p udp -j NFQUEUE --queue-num {QUEUE}")
        # NAT hooks run only while some rule translates.
        nat = f"-d {VIP[version]} -p 253 -j DNAT --to {BACKEND[version]}"
        sh(f"{run} {tool} -w -t nat -A PREROUTING {nat}")
        # Labels are stored only while some rule asks for them.
        sh(f"{run} {tool} -w -t filter -A FORWARD -m connlabel --label 127")
    links = json.loads(sh(f"ip -n {node} -j link"))
    return {link["ifname"]: link["ifindex"] for link in links}


def open_flow(namespace: str, version: int, kind: str, port: int, **options: int) -> socket.socket:
    """Start a TCP connection, or send a datagram, from ``port`` to the VIP's port 80."""
    with inside(namespace):
        flow = socket.socket(
            FAMILY[version], socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
        )
    flow.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option, value in options.items():
        flow.setsockopt(
            socket.SOL_SOCKET, {"mark": SO_MARK, "priority": SO_PRIORITY}[option], value
        )
    flow.setblocking(False)
    source = CLIENT[version] if namespace.endswith("client") else NODE[version]
    flow.bind((source, port))
    flow.connect_ex((VIP[version], 80))
    if kind == "udp":
        flow.send(b"x" * 32)
    return flow


def capture_acks(node: str, queue: Netlink, out: Recorder) -> None:
    """Configuration acknowledgements and failures, with every kind of repeated request."""
    out.add(
        "ack bind", queue.ask(nfqueue.bind(QUEUE, 101)), errno=0, seq=101, type=nfqueue.MSG_CONFIG
    )
    configs = {
        "params": nfqueue.config_params(QUEUE, 102, 128),
        "maxlen": nfqueue.config_maxlen(QUEUE, 103, 4096),
        "flags": nfqueue.config_flags(
            QUEUE,
            104,
            nfqueue.NFQA_CFG_F_FAIL_OPEN | nfqueue.NFQA_CFG_F_UID_GID,
            nfqueue.NFQA_CFG_F_FAIL_OPEN | nfqueue.NFQA_CFG_F_UID_GID,
        ),
    }
    for number, (name, request) in enumerate(configs.items(), start=102):
        out.add(f"ack {name}", queue.ask(request), errno=0, seq=number, type=nfqueue.MSG_CONFIG)
    rebound = queue.ask(nfqueue.bind(QUEUE, 116))
    out.add("ack bind twice", rebound, errno=16, seq=116, type=nfqueue.MSG_CONFIG)
    flow = tuple_of(4, "tcp", 4999)
    new = {"dnat": None, "snat": None, "timeout_s": 60, "seq": 111, "ack": True}
    for cap in (True, False):
        other = Netlink(node, nlmsg.NETLINK_NETFILTER, cap=cap, ext=False)
        style = "capped" if cap else "whole request"
        bound = other.ask(nfqueue.bind(QUEUE, 105))
        out.add(
            f"ack bind of a taken queue, {style}", bound, errno=1, seq=105, type=nfqueue.MSG_CONFIG
        )
        created = other.ask(ctnetlink.new_entry(flow, **new))
        out.add(f"ack new entry, {style}", created, errno=0, seq=111, type=ctnetlink.MSG_NEW)
        again = other.ask(ctnetlink.new_entry(flow, **new))
        out.add(f"ack EEXIST, {style}", again, errno=17, seq=111, type=ctnetlink.MSG_NEW)
        deleted = other.ask(ctnetlink.delete_entry(flow, 112))
        out.add(f"ack delete, {style}", deleted, errno=0, seq=112, type=ctnetlink.MSG_DELETE)
        gone = other.ask(ctnetlink.delete_entry(flow, 113))
        out.add(f"ack ENOENT, {style}", gone, errno=2, seq=113, type=ctnetlink.MSG_DELETE)
        absent = other.ask(ctnetlink.get_entry(flow, 114))
        out.add(f"ack get ENOENT, {style}", absent, errno=2, seq=114, type=ctnetlink.MSG_GET)
        # A timeout of two bytes breaks the kernel's policy: it says so in words.
        told = Netlink(node, nlmsg.NETLINK_NETFILTER, cap=cap, ext=True)
        wrong = nfnetlink.message(
            ctnetlink.MSG_NEW,
            nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_CREATE,
            115,
            nlmsg.attribute(ctnetlink.CTA_TIMEOUT, b"\0\1"),
            family=nlmsg.AF_INET,
        )
        out.add(
            f"ack with text, {style}",
            told.ask(wrong),
            errno=34,
            seq=115,
            type=ctnetlink.MSG_NEW,
            message="Attribute failed policy validation",
            offset=20,
        )


def tuple_of(version: int, kind: str, port: int, source: str | None = None) -> ctnetlink.Tuple:
    src, dst = packed(source or CLIENT[version]), packed(VIP[version])
    if kind == "icmp":
        protocol, request = (1, 8) if version == 4 else (58, 128)
        return ctnetlink.Tuple(src, dst, protocol, icmp_id=port, icmp_type=request, icmp_code=0)
    number = {"tcp": 6, "udp": 17, "sctp": 132}[kind]
    return ctnetlink.Tuple(src, dst, number, port, 80)


def capture_packets(
    names: tuple[str, str], index: dict[str, int], queue: Netlink, out: Recorder, layout: bool
) -> None:
    """Queued packets: forwarded and local, both families, with and without mark and truncation."""
    client, node = names
    flows = []
    port = 5000
    for version in (4, 6):
        for kind in ("tcp", "udp"):
            for where, options in (
                (client, {}),
                (node, {}),
                (node, {"mark": 0x1234, "priority": 6}),
            ):
                port += 1
                flows.append(open_flow(where, version, kind, port, **options))
                data = queue.receive()
                forwarded = where == client
                hook = "PREROUTING" if forwarded else "OUTPUT"
                name = f"packet {hook} IPv{version} {kind}" + (" marked" if options else "")
                out.add(
                    name,
                    data,
                    queue=QUEUE,
                    family=int(FAMILY[version]),
                    hook=nfqueue.NF_INET_PRE_ROUTING if forwarded else nfqueue.NF_INET_LOCAL_OUT,
                    indev=index["front"] if forwarded else 0,
                    outdev=0 if forwarded else index["pods"],
                    hw_protocol=0x0800 if version == 4 else 0x86DD,
                    mark=options.get("mark", 0),
                    uid=None if forwarded else 0,
                    src=packed(CLIENT[version] if forwarded else NODE[version]).hex(),
                    dst=packed(VIP[version]).hex(),
                    protocol=6 if kind == "tcp" else 17,
                    src_port=port,
                    dst_port=80,
                )
                if layout:
                    print_layout(name, data)
                drop_all(queue, data)
    # What a host may turn on at any time: receive timestamps, and packets left unsegmented and
    # without their checksum. Both put one more attribute before the payload.
    stamping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stamping.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
    gso = nfqueue.NFQA_CFG_F_GSO
    for where, name, info in (
        (client, "packet PREROUTING with timestamp", 0),
        (client, "packet PREROUTING unsegmented", nfqueue.NFQA_SKB_CSUMNOTREADY),
        (node, "packet OUTPUT unsegmented", nfqueue.NFQA_SKB_CSUMNOTREADY),
    ):
        port += 1
        queue.ask(nfqueue.config_flags(QUEUE, 109, gso if info else 0, gso))
        flows.append(open_flow(where, 4, "tcp", port))
        data = queue.receive()
        out.add(name, data, queue=QUEUE, src_port=port, dst_port=80, skb_info=info)
        if layout:
            print_layout(name, data)
        drop_all(queue, data)
        stamping.close()
    queue.ask(nfqueue.config_flags(QUEUE, 110, 0, gso))
    queue.ask(nfqueue.config_params(QUEUE, 106, 48))
    flows.append(open_flow(client, 6, "tcp", 5999))
    data = queue.receive()
    out.add("packet cut by the copy range", data, payload_length=48, is_truncated=True)
    if layout:
        print_layout("packet cut by the copy range", data)
    drop_all(queue, data)
    queue.ask(nfqueue.config_params(QUEUE, 107, 128))
    unknown = queue.ask(nfqueue.verdict(QUEUE, 0xFFFFFF, nfqueue.NF_ACCEPT, seq=108))
    out.add("ack verdict on an unknown packet", unknown, errno=2, seq=108, type=nfqueue.MSG_VERDICT)
    for flow in flows:
        flow.close()


def print_layout(name: str, data: bytes) -> None:
    (message,) = nlmsg.messages(data)
    known = {
        value: key
        for key, value in vars(nfqueue).items()
        if key.startswith("NFQA_")
        and "_CFG_" not in key
        and "_SKB_C" not in key
        and key != "NFQA_SKB_GSO"
    }
    parts = [
        f"{known.get(type_, type_)}({len(value)})"
        for type_, value in nlmsg.attribute_list(message.payload[4:])
    ]
    print(f"{name}: {' '.join(parts)}")


def drop_all(queue: Netlink, data: bytes) -> None:
    for message in nlmsg.messages(data):
        packet_id = nfqueue.parse_packet(message.payload).packet_id
        queue.socket.send(nfqueue.verdict(QUEUE, packet_id, nfqueue.NF_DROP))


def capture_entries(node: str, out: Recorder) -> None:
    """Made entries read back by GET, dump and events, for each protocol and family."""
    work = Netlink(node, nlmsg.NETLINK_NETFILTER)
    events = Netlink(node, nlmsg.NETLINK_NETFILTER)
    events.join(nfnetlink.NFNLGRP_CONNTRACK_NEW)
    events.join(nfnetlink.NFNLGRP_CONNTRACK_DESTROY)
    pid = work.socket.getsockname()[0]
    labels = bytes(15) + b"\x40"
    made = []
    for version in (4, 6):
        for position, kind in enumerate(("tcp", "udp", "sctp", "icmp")):
            port = 6000 + position
            flow = tuple_of(version, kind, port)
            has_port = kind != "icmp"
            request = ctnetlink.new_entry(
                flow,
                dnat=ctnetlink.Nat(packed(BACKEND[version]), 8080 if has_port else None),
                snat=ctnetlink.Nat(
                    packed(POD_GATEWAY[version]), 40000 + position if has_port else None
                ),
                timeout_s=300,
                seq=200 + position,
                mark=0x77,
                labels=labels,
                ack=True,
            )
            acknowledged = work.ask(request)
            out.add(
                f"ack new {kind} IPv{version}",
                acknowledged,
                errno=0,
                seq=200 + position,
                type=ctnetlink.MSG_NEW,
            )
            expect = {
                "src": flow.src.hex(),
                "dst": flow.dst.hex(),
                "protocol": flow.protocol,
                "src_port": flow.src_port,
                "dst_port": flow.dst_port,
                "icmp_id": flow.icmp_id,
                "reply_src": packed(BACKEND[version]).hex(),
                "reply_dst": packed(POD_GATEWAY[version]).hex(),
                "reply_src_port": 8080 if has_port else 0,
                "reply_dst_port": 40000 + position if has_port else 0,
                "is_dnat": True,
                "is_snat": True,
                "has_seen_reply": False,
                "mark": 0x77,
                "labels": labels.hex(),
            }
            made.append((flow, kind, version, expect))
            out.add(f"event NEW {kind} IPv{version}", events.receive(), pid=pid, **expect)
            out.add(f"get {kind} IPv{version}", work.ask(ctnetlink.get_entry(flow, 300)), **expect)
    for version in (4, 6):
        for number, data in enumerate(
            work.dump(ctnetlink.dump(int(FAMILY[version]), 400, mark=0x77))
        ):
            out.add(f"dump IPv{version} part {number}", data, seq=400, mark=0x77)
    for flow, kind, version, expect in made:
        work.ask(ctnetlink.delete_entry(flow, 500))
        out.add(
            f"event DESTROY {kind} IPv{version}",
            events.receive(),
            pid=pid,
            **expect | {"labels": ""},
        )
    # An entry that ends by itself: nobody caused it, and no time is left to tell.
    short = ctnetlink.new_entry(
        tuple_of(4, "udp", 6100), dnat=None, snat=None, timeout_s=1, seq=501, ack=True
    )
    work.ask(short)
    events.receive()
    events.socket.settimeout(0.2)
    for _ in range(25):
        work.dump(ctnetlink.dump(socket.AF_INET, 502))  # A dump reaps what has expired.
        try:
            ended = events.receive()
            break
        except TimeoutError:
            continue
    expect = {"pid": 0, "src_port": 6100, "timeout_s": None, "is_dnat": False}
    out.add("event DESTROY expired", ended, **expect)


def capture_connection(names: tuple[str, str, str], queue: Netlink, out: Recorder) -> None:
    """A whole connection through the queue: entry made, packet accepted, states read on the way."""
    client, node, backend = names
    work = Netlink(node, nlmsg.NETLINK_NETFILTER)
    for version in (4, 6):
        with inside(backend):
            server = socket.create_server((BACKEND[version], 8080), family=FAMILY[version])
        server.settimeout(5)
        flow = tuple_of(version, "tcp", 7000)
        connection = open_flow(client, version, "tcp", 7000)
        (message,) = nlmsg.messages(queue.receive())
        packet_id = nfqueue.parse_packet(message.payload).packet_id
        work.ask(
            ctnetlink.new_entry(
                flow,
                dnat=ctnetlink.Nat(packed(BACKEND[version]), 8080),
                snat=None,
                timeout_s=60,
                seq=1,
                ack=True,
            )
        )
        expect = {
            "src": flow.src.hex(),
            "reply_src": packed(BACKEND[version]).hex(),
            "reply_dst": packed(CLIENT[version]).hex(),
            "is_dnat": True,
            "is_snat": False,
        }
        fresh = work.ask(ctnetlink.get_entry(flow, 601))
        out.add(
            f"get inserted connection IPv{version}",
            fresh,
            tcp_state=0,
            has_seen_reply=False,
            **expect,
        )
        queue.socket.send(nfqueue.verdict(QUEUE, packet_id, nfqueue.NF_ACCEPT))
        accepted, _ = server.accept()
        accepted.sendall(b"served")
        connection.settimeout(5)
        assert connection.recv(6) == b"served"
        live = work.ask(ctnetlink.get_entry(flow, 602))
        out.add(
            f"get live connection IPv{version}", live, tcp_state=3, has_seen_reply=True, **expect
        )
        accepted.close()
        assert connection.recv(1) == b""
        connection.close()
        with inside(client):  # Its answer, a RST to port 9, says that the close has been seen.
            probe = socket.socket(FAMILY[version], socket.SOCK_STREAM)
        probe.settimeout(5)
        probe.connect_ex((BACKEND[version], 9))
        probe.close()
        ended = work.ask(ctnetlink.get_entry(flow, 603))
        out.add(
            f"get closed connection IPv{version}", ended, tcp_state=7, has_seen_reply=True, **expect
        )
        server.close()


def capture_routes(node: str, index: dict[str, int], out: Recorder) -> None:
    """Route look-ups, addresses, and an address event."""
    route = Netlink(node, nlmsg.NETLINK_ROUTE)
    far = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
    for version in (4, 6):
        lookups = {
            "on-link": (
                BACKEND[version],
                rtnetlink.RTN_UNICAST,
                "pods",
                None,
                POD_GATEWAY[version],
            ),
            "by gateway": (
                far[version],
                rtnetlink.RTN_UNICAST,
                "pods",
                BACKEND[version],
                POD_GATEWAY[version],
            ),
            "local": (NODE[version], rtnetlink.RTN_LOCAL, "lo", None, NODE[version]),
        }
        for name, (dst, type_, device, gateway, source) in lookups.items():
            out.add(
                f"route {name} IPv{version}",
                route.ask(rtnetlink.get_route(packed(dst), 700)),
                dst=packed(dst).hex(),
                type=type_,
                oif=index[device],
                gateway=packed(gateway).hex() if gateway else None,
                prefsrc=packed(source).hex(),
            )
        prefix = "198.51.100.0/24" if version == 4 else "2001:db8:dead::/48"
        sh(f"ip -n {node} route add unreachable {prefix}")
        dead = packed("198.51.100.1" if version == 4 else "2001:db8:dead::1")
        answer = route.ask(rtnetlink.get_route(dead, 701))
        # EHOSTUNREACH is 113: an unreachable route, told as an error.
        out.add(
            f"ack unreachable IPv{version}", answer, errno=113, seq=701, type=rtnetlink.RTM_GETROUTE
        )
        for number, data in enumerate(
            route.dump(rtnetlink.dump_addresses(int(FAMILY[version]), 702))
        ):
            out.add(f"addresses IPv{version} part {number}", data, seq=702)
    events = Netlink(node, nlmsg.NETLINK_ROUTE)
    events.join(rtnetlink.RTNLGRP_IPV4_IFADDR)
    sh(f"ip -n {node} addr add 192.0.2.77/24 dev front")
    sh(f"ip -n {node} addr del 192.0.2.77/24 dev front")
    for verb in ("NEWADDR", "DELADDR"):
        out.add(
            f"event {verb}",
            events.receive(),
            ifindex=index["front"],
            address=packed("192.0.2.77").hex(),
            prefix_length=24,
            is_secondary=True,
        )


def main() -> None:
    prefix = f"cap{secrets.token_hex(3)}-"
    names = (f"{prefix}client", f"{prefix}node", f"{prefix}backend")
    layout = "--layout" in sys.argv[1:]
    out = Recorder()
    try:
        index = build(*names)
        queue = Netlink(names[1], nlmsg.NETLINK_NETFILTER)
        capture_acks(names[1], queue, out)
        capture_packets(names[:2], index, queue, out, layout)
        capture_entries(names[1], out)
        capture_connection(names, queue, out)
        capture_routes(names[1], index, out)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    kernel = ".".join(platform.release().split(".")[:2])
    document = {
        "from": f"capture.py beside this file, on Linux {kernel}, {platform.machine()}",
        "byte_order": sys.byteorder,
        "captures": out.captures,
    }
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(out.captures)} captures written to {OUTPUT.name}")


if __name__ == "__main__":
    main()
