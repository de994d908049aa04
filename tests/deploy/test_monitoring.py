"""Alerts and dashboard: read by Prometheus' and Grafana's own code, and about metrics that there are."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from nfqproxy.api.metric_names import METRICS
from tests.deploy import tools

FOLDER = tools.DEPLOY / "monitoring"
OURS = re.compile(r"\b(?:nfqproxy|kubeproxy)_\w+")
GRAFANA_WIDTH = 24


def dashboard() -> Any:
    return json.loads((FOLDER / "dashboard.json").read_text())


def dashboard_queries() -> list[str]:
    return [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]


def alerts() -> list[Any]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    found: list[Any] = group["rules"]
    return found


def used(*queries: str) -> set[str]:
    return {name for query in queries for name in OURS.findall(query)}


def test_each_name_stands_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(OURS.fullmatch(name) for name in names)


def test_alerts_and_dashboard_ask_for_metrics_that_there_are() -> None:
    series = {name for metric in METRICS for name in metric.series}
    variables = [each["query"]["query"] for each in dashboard()["templating"]["list"][1:]]
    asked = used(*variables, *dashboard_queries(), *(alert["expr"] for alert in alerts()))
    assert asked <= series
    # And everything that is measured is shown somewhere.
    assert not [metric.name for metric in METRICS if not asked & set(metric.series)]


def test_labels_that_are_asked_for_exist() -> None:
    """Of metrics with labels of their own, those named in by (...) and {{...}}."""
    known = {label for metric in METRICS for label in metric.labels} | {"instance", "job", "le"}
    named: set[str] = set()
    for query in [*dashboard_queries(), *(alert["expr"] for alert in alerts())]:
        for group in re.findall(r"by \(([^)]*)\)", query):
            named.update(group.replace(" ", "").split(","))
    for text in (FOLDER / "dashboard.json", FOLDER / "alerts.yaml"):
        named.update(re.findall(r"{{ ?(?:\$labels\.)?(\w+) ?}}", text.read_text()))
    assert named <= known


def test_prometheus_reads_the_alerts() -> None:
    done = tools.run("promtool", "check", "rules", FOLDER / "alerts.yaml")
    assert done.returncode == 0, done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def test_each_alert_fires_for_what_it_is_about_and_for_nothing_else() -> None:
    tried = (FOLDER / "alerts_test.yaml").read_text()
    for alert in alerts():
        assert f'alertname="{alert["alert"]}"' in tried
    done = tools.run("promtool", "test", "rules", "alerts_test.yaml", cwd=FOLDER)
    assert done.returncode == 0, done.stderr


def test_prometheus_reads_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in."""
    queries = [query.replace("$__rate_interval", "5m") for query in dashboard_queries()]
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = tools.run("promtool", "check", "rules", file)
    assert done.returncode == 0, done.stderr
    assert len(queries) > len(METRICS) // 2


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where ``after`` lacks something of ``before`` or differs from it."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                yield f"{path}.{key}"
            else:
                yield from lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif before != after:
        yield path


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Read into Grafana's published types and written again: a field they do not have does not come back."""
    register_default_plugins()
    document = dashboard()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(document)))
    assert list(lost(document, again)) == []


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= GRAFANA_WIDTH for panel in panels)
