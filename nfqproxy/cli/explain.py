"""``nfqproxy explain``: what happens to a packet, and why."""

import logging
import socket
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec
from rich.console import Console
from rich.text import Text

from nfqproxy.api import admin
from nfqproxy.app import file_source_of
from nfqproxy.cli.data_path_options import data_path_options
from nfqproxy.control.node import detector_gap, node_context
from nfqproxy.control.table import service_ports
from nfqproxy.core.explain import Explainer, Explanation, Packet, parse_packet
from nfqproxy.core.plan_table import plans_for_node
from nfqproxy.errors import InputError
from nfqproxy.sources import config as configuration
from nfqproxy.sources.schema import nearest

log = logging.getLogger(__name__)

_AT_ONCE = 200
"""Packets in one request to the running proxy: its answer comes before the socket's time-out."""

Explain = Callable[[list[Packet]], Iterator[Explanation]]


@click.command()
@click.option(
    "--manifests",
    multiple=True,
    type=click.Path(),
    help="File or directory of manifests; may be repeated. Without: the running proxy is asked.",
)
@click.option(
    "--iptables-save",
    multiple=True,
    metavar="FILE|live",
    help="In place of manifests: kube-proxy's rules, as for nfqproxy run; may be repeated.",
)
@click.option("--node", help="Name of the node the packet is on. Default: this host's.")
@click.option(
    "--node-address",
    "node_addresses",
    multiple=True,
    help="Local address of the node beside those of its Node manifest; may be repeated.",
)
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file."
)
@click.option("--mode", type=click.Choice(configuration.MODES), help="Default: replace.")
@data_path_options
@click.option("--cluster-cidr", help="Pod networks, comma separated.")
@click.option(
    "--from", "source", metavar="IP[%IFACE]", help="Source, and the interface it came by."
)
@click.option(
    "--to",
    "destination",
    metavar="IP:PORT/PROTOCOL",
    help="tcp, udp or sctp; or IP/icmp, IP/icmpv6.",
)
@click.option(
    "--packets",
    type=click.File(encoding="utf-8"),
    help='Many packets, JSON lines like {"from": "10.0.0.2", "to": "10.96.0.10:80/tcp"}; - is stdin.',
)
@click.option(
    "-o",
    "output",
    type=click.Choice(["text", "json"]),
    help="Default: text for one packet; --packets prints JSON lines always.",
)
def explain(
    manifests: tuple[str, ...],
    iptables_save: tuple[str, ...],
    node: str | None,
    config_file: Path | None,
    source: str | None,
    destination: str | None,
    packets: TextIO | None,
    output: str | None,
    **flags: Any,
) -> int:
    """Say what happens to the first packet of a connection, hook by hook, and why.

    With --manifests nothing is touched and no privilege is needed; the decision is made by the code that
    decides in the proxy. Without, the proxy that runs here answers for what it holds now.

    Example: nfqproxy explain --manifests services.yaml --node n1 --from 10.244.1.9 --to 10.96.0.10:80/tcp
    """
    _check_usage(source, destination, packets, output)
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    is_described = bool(config_file or node or given)
    sources = {"manifests": manifests, "iptables_save": iptables_save}
    given |= {name: paths for name, paths in sources.items() if paths}
    config = configuration.from_file_and_flags(config_file, given)
    if config.kubeconfig or config.in_cluster:
        raise InputError(
            f"{config_file} follows the Kubernetes API, which explain does not ask; give --manifests or"
            " --iptables-save too, or leave --config out to ask the running proxy"
        )
    if config.has_source:
        answers = _offline(config, node)
    elif is_described:
        raise InputError(
            "--node, --node-address, --config, --mode, --data-path, --mark-mask and --cluster-cidr describe a"
            " node whose Services are missing; give --manifests or --iptables-save, or leave them all out to"
            " ask the running proxy"
        )
    else:
        answers = _running
    if packets is not None:
        return _bulk(answers, packets)
    assert source is not None
    assert destination is not None
    packet = parse_packet(source, destination)
    (answer,) = answers([packet])
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    else:
        _tell(packet, answer)
    return 0


def _check_usage(
    source: str | None, destination: str | None, packets: TextIO | None, output: str | None
) -> None:
    if packets is None and (source is None or destination is None):
        raise click.UsageError("give --from and --to, or --packets")
    if packets is not None and (source is not None or destination is not None):
        raise click.UsageError("--packets brings the packets; leave out --from and --to")
    if packets is not None and output == "text":
        raise click.UsageError("--packets prints JSON lines; leave out -o text")


def _offline(config: configuration.ProxyConfig, node_name: str | None) -> Explain:
    """Explain by these manifests: the same steps as the proxy takes, without the host."""
    name = node_name or config.hostname_override or socket.gethostname().lower()
    settings = config.node_settings(name)
    objects = file_source_of(config, name).load()
    others = ", ".join(node.name for node in objects.nodes)
    if others and not any(node.name == name for node in objects.nodes):
        log.warning("the manifests have no Node %s, only %s; see --node", name, others)
    context = node_context(objects, settings)
    gap = detector_gap(context, settings)
    if gap is not None:
        log.warning("%s", gap)
    ports = service_ports(objects, node_name=name).values()
    explainer = Explainer(
        node=context,
        settings=settings,
        ports=ports,
        plans=plans_for_node(ports, context, settings),
    )
    return lambda packets: map(explainer.explain, packets)


def _running(packets: list[Packet]) -> Iterator[Explanation]:
    """Explain by what the running proxy holds."""
    for start in range(0, len(packets), _AT_ONCE):
        asked = [
            {
                "from": f"{each.source}%{each.interface}" if each.interface else each.source,
                "to": str(each),
            }
            for each in packets[start : start + _AT_ONCE]
        ]
        document = admin.ask("explain", packets=asked)
        yield from msgspec.convert(document["explanations"], list[Explanation])


def _bulk(answers: Explain, lines: Iterable[str]) -> int:
    """One JSON line for each line that is not blank; 2 when any of them could not be read."""
    read = [_packet(line) for line in lines if line.strip()]
    explained = answers([each for each in read if isinstance(each, Packet)])
    encoder = msgspec.json.Encoder()
    out = sys.stdout
    for each in read:
        answer = next(explained) if isinstance(each, Packet) else {"error": each}
        out.write(encoder.encode(answer).decode() + "\n")
    out.flush()
    return 2 if any(isinstance(each, str) for each in read) else 0


_FIELDS = ("from", "to")
_EXAMPLE = 'write {"from": "10.0.0.2", "to": "10.96.0.10:80/tcp"}'


def _packet(line: str) -> Packet | str:
    """The packet of a line, or what is wrong with it."""
    try:
        asked = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError) as error:
        return f"the line is not JSON: {error}; {_EXAMPLE}"
    if not isinstance(asked, dict):
        return f"the line is no JSON object; {_EXAMPLE}"
    for name in asked:
        if name not in _FIELDS:
            return f'unknown field "{name}", {nearest(name, _FIELDS)}'
    for name in _FIELDS:
        if not isinstance(asked.get(name), str):
            fault = "must be a string" if name in asked else "is missing"
            return f'field "{name}" {fault}; {_EXAMPLE}'
    try:
        return parse_packet(asked["from"], asked["to"])
    except InputError as error:
        return str(error)


_NARROWEST = 40
_COLOURS = {"backend": "green", "reject": "red", "drop": "red", "pass": "yellow"}


def _tell(packet: Packet, answer: Explanation) -> None:
    """The story for a person: the answer first, then the way, a hook a row."""
    console = Console(highlight=False)
    by = f" by {packet.interface}" if packet.interface else ""
    title = Text(f"{packet.source}{by} -> {packet}: ")
    title.append(str(answer.verdict), style=f"bold {_COLOURS[answer.verdict]}")
    console.print(title, soft_wrap=True)
    console.print(Text(answer.reason))
    if answer.backends:
        console.print()
        _tell_backends(console, answer)
    console.print()
    _tell_way(console, answer.steps)


def _tell_way(console: Console, steps: tuple[str, ...]) -> None:
    """A hook a paragraph; conntrack entries stay on one line, to be copied and searched for."""
    split = [step.partition(": ")[::2] for step in steps]
    indent = " " * (max(len(hook) for hook, _ in split) + 2)
    last = ""
    for hook, text in split:
        head = Text("" if hook == last else hook, style="bold")
        head.pad_right(len(indent) - len(head))
        width = max(console.width - len(indent), _NARROWEST)
        lines = [text] if " src=" in text else textwrap.wrap(text, width, break_on_hyphens=False)
        for line in lines:
            console.print(head + Text(line), soft_wrap=True)
            head = Text(indent)
        last = hook


def _tell_backends(console: Console, answer: Explanation) -> None:
    rows = [("backend", "node", "weight", "chance", "sees the source")]
    rows += [
        (
            str(backend),
            backend.node or "-",
            str(backend.weight),
            f"{100 * backend.probability:.4g} %",
            "the node's address" if backend.masquerade else "the client's own",
        )
        for backend in answer.backends
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if index in (2, 3) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(
            Text("  ".join(cells).rstrip(), style="" if number else "bold"), soft_wrap=True
        )
