"""docs/operations.md names every field of the configuration file, every metric and every alert."""

import re
from collections.abc import Iterable

import msgspec
import yaml

from nfqproxy.api.metric_names import METRICS
from nfqproxy.sources.config import DetectLocal, ProxyConfig
from tests.deploy import tools

PAGE = (tools.ROOT / "docs/operations.md").read_text()
CONTAINERS = {"detectLocal"}
"""Fields whose own fields are told."""


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the table below a heading, by their first cell."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {cell[0].strip("`"): cell[1:] for cell in cells[2:]}


def names(fields: Iterable[msgspec.structs.FieldInfo], before: str = "") -> set[str]:
    return {before + field.encode_name for field in fields} - CONTAINERS


def test_every_field_of_the_configuration_file() -> None:
    told = rows("Configuration file")
    known = names(msgspec.structs.fields(ProxyConfig))
    known |= names(msgspec.structs.fields(DetectLocal), "detectLocal.")
    planned = {name for name, cells in told.items() if "*planned*" in cells[-1]}
    assert set(told) - planned == known
    assert not planned & known


def test_defaults_of_the_configuration_file() -> None:
    told = rows("Configuration file")
    for field in msgspec.structs.fields(ProxyConfig):
        cell = told.get(field.encode_name, [""])[0]
        if cell.startswith("`"):
            value = yaml.safe_load(cell.strip("`"))
            default = field.default
            assert value == (list(default) if isinstance(default, tuple) else default), field.name
        elif cell:
            assert field.default in ("", None, ()), field.name


def test_every_metric() -> None:
    assert rows("Metrics") == {
        metric.name: [
            str(metric.kind),
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.help,
        ]
        for metric in METRICS
    }


def test_every_alert() -> None:
    (group,) = yaml.safe_load((tools.DEPLOY / "monitoring/alerts.yaml").read_text())["groups"]
    assert list(rows("Alerts and dashboard")) == [rule["alert"] for rule in group["rules"]]
