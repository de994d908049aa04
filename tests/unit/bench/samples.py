"""Results as a run would give them, with figures that can be computed in one's head."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from bench import result as results
from bench.observation import Observation, Parameter
from bench.profiles import PROFILES
from bench.result import Ran, Result

PLACE = {"cpu": "Test CPU", "cpus": 2, "architecture": "x86_64"}


def observe(
    values: Iterable[float],
    *,
    experiment: str = "connections",
    contender: str = "nfqproxy",
    metric: str = "worker_cpu",
    unit: str = "us",
    **parameters: Parameter,
) -> list[Observation]:
    """One observation per value, in rounds 1, 2, ..."""
    return [
        Observation(
            experiment=experiment,
            contender=contender,
            metric=metric,
            unit=unit,
            value=value,
            round=number,
            parameters=parameters,
        )
        for number, value in enumerate(values, 1)
    ]


def result(observations: Sequence[Observation], **fields: object) -> Result:
    """A complete result of a machine at rest."""
    names = tuple(dict.fromkeys(each.experiment for each in observations))
    made = Result(
        kind=results.KIND,
        schema=results.SCHEMA,
        commit="c0ffee" * 6 + "abcd",
        is_modified=False,
        machine=PLACE,
        kernel="Linux 6.18",
        python="CPython 3.11.7",
        versions={"uvloop": "0.23.0", "netfilterqueue": None},
        load_average=0.01,
        scale=replace(PROFILES["short"], seed=7),
        asked=names,
        ran=tuple(Ran(name=name, title=f"What of {name}?", seconds=1.5) for name in names),
        started="2026-11-20T10:00:00+00:00",
        ended="2026-11-20T10:03:00+00:00",
        observations=tuple(observations),
    )
    return msgspec.structs.replace(made, **fields)


CONTENDERS = ("nfqproxy", "c", "dnat", "kube-proxy-iptables")


def everything() -> list[Observation]:
    """Several experiments: lines over Services and quantiles, bars, one contender alone, a zero."""
    found = []
    for index, contender in enumerate(CONTENDERS, 1):
        for services in (1, 100, 5000):
            values = [index * 1.5 + services / 1e4 + number / 100 for number in range(5)]
            found += observe(values, contender=contender, services=services)
            rates = [1e6 / value for value in values]
            found += observe(
                rates, contender=contender, metric="rate", unit="1/s", services=services
            )
        for quantile in (0.5, 0.9, 0.99, 0.999):
            for load in ("idle", "half"):
                values = [index * 20 / (1.01 - quantile) + number for number in range(5)]
                found += observe(
                    values,
                    experiment="latency",
                    contender=contender,
                    metric="connect",
                    quantile=quantile,
                    load=load,
                )
        found += observe(
            [index * 1e9 + number for number in range(5)],
            experiment="bulk",
            contender=contender,
            metric="throughput",
            unit="bit/s",
        )
    found += observe([0.0] * 5, experiment="requests", metric="userspace_packets", unit="packets")
    for services in (1, 5000):
        for index, metric in enumerate(("supervisor_rss", "worker_rss"), 1):
            found += observe(
                [services * 1e3 + index * 40e6 + number * 1e6 for number in range(3)],
                experiment="memory",
                metric=metric,
                unit="bytes",
                services=services,
                endpoints=services * 3,
            )
        for index, source in enumerate(("directory", "file"), 1):
            found += observe(
                [services + index * 1000 + number for number in range(3)],
                experiment="programming",
                metric="first_sync",
                unit="ms",
                services=services,
                endpoints=services * 3,
                source=source,
            )
    return found
