"""The regression check: ratios to the C worker of the same run, held against stored ones.

A ratio to a contender of the same round says little about the machine and much about the program, so
that one stored on one machine can be used on another of its kind.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.bars import FLOOR, NFQPROXY
from bench.intervals import Interval
from bench.observation import Observation, Parameter
from bench.provenance import Facts
from bench.result import Result, facets, read_document, write_text
from bench.series import series
from nfqproxy.errors import InputError, NfqproxyError

PATH = Path(__file__).parent / "baseline.json"
EXPERIMENT, METRIC = "connections", "worker_cpu"
TOLERANCE = 0.15
"""By how much the ratio may grow before it is a regression, as a share."""
KIND = "nfqproxy-bench-baseline"
SCHEMA = 1


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """nfqproxy to the C worker, under some parameters."""

    parameters: dict[str, Parameter]
    middle: float
    low: float
    high: float
    rounds: int


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stored document."""

    kind: str
    schema: int
    experiment: str
    metric: str
    contender: str
    relative_to: str
    commit: str | None
    machine: Facts
    kernel: str
    python: str
    load_average: float
    profile: str
    measured: str
    """UTC, ISO 8601."""
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One ratio beside the stored one."""

    parameters: str
    stored: float
    measured: Interval
    limit: float

    @property
    def is_regression(self) -> bool:
        """Whether the whole interval lies above the limit: no round's luck explains it."""
        return self.measured.low > self.limit

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies below the stored ratio by as much."""
        return self.measured.high < self.stored / (self.limit / self.stored)


def of(result: Result) -> Baseline:
    """The baseline that a result gives; NfqproxyError if it may not give one."""
    if result.is_modified:
        raise NfqproxyError(
            "the working tree had changes when this was measured: commit them and measure again"
        )
    ratios = _ratios(result.observations)
    return Baseline(
        kind=KIND,
        schema=SCHEMA,
        experiment=EXPERIMENT,
        metric=METRIC,
        contender=NFQPROXY,
        relative_to=FLOOR,
        commit=result.commit,
        machine=result.machine,
        kernel=result.kernel,
        python=result.python,
        load_average=result.load_average,
        profile=result.scale.name,
        measured=result.started,
        ratios=tuple(
            Ratio(
                parameters=dict(parameters),
                middle=ratio.middle,
                low=ratio.low,
                high=ratio.high,
                rounds=ratio.count,
            )
            for parameters, ratio in ratios.items()
        ),
    )


def save(baseline: Baseline, path: Path) -> None:
    """Writes it whole."""
    write_text(path, json.dumps(msgspec.to_builtins(baseline), indent=1) + "\n")


def load(path: Path) -> Baseline:
    """The stored baseline; :class:`InputError` says why there is none."""
    if not path.exists():
        raise InputError(
            f"{path} is not there: write it with `python -m bench baseline RESULT` from a run of the "
            f"experiment {EXPERIMENT} on an idle machine"
        )
    document = read_document(path)
    if (document.get("kind"), document.get("schema")) != (KIND, SCHEMA):
        raise InputError(
            f"{path} is no baseline of schema {SCHEMA}: write it with `python -m bench baseline`"
        )
    try:
        return msgspec.convert(document, Baseline)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}; write it with `python -m bench baseline`") from None


def check(
    baseline: Baseline, observations: Iterable[Observation], *, tolerance: float = TOLERANCE
) -> list[Check]:
    """The ratios that both have; NfqproxyError when there is none."""
    measured = _ratios(observations)
    checks = []
    for stored in baseline.ratios:
        parameters = facets(stored.parameters)
        if parameters in measured:
            checks.append(
                Check(
                    parameters=", ".join(f"{key} {value}" for key, value in parameters),
                    stored=stored.middle,
                    measured=measured[parameters],
                    limit=stored.middle * (1 + tolerance),
                )
            )
    if not checks:
        raise NfqproxyError(
            "the baseline and this run have no parameters in common: run the profile that the baseline "
            f"names ({baseline.profile})"
        )
    return checks


def _ratios(
    observations: Iterable[Observation],
) -> dict[tuple[tuple[str, Parameter], ...], Interval]:
    """nfqproxy / C by parameters; NfqproxyError without both."""
    found = {
        (one.contender, one.facets): one
        for one in series(observations)
        if (one.experiment, one.metric) == (EXPERIMENT, METRIC)
    }
    ratios = {}
    for (contender, parameters), one in found.items():
        floor = found.get((FLOOR, parameters))
        if contender == NFQPROXY and floor is not None:
            ratio = one.ratio_to(floor)
            if ratio is not None:
                ratios[parameters] = ratio
    if not ratios:
        raise NfqproxyError(
            f"there is no {METRIC} of {NFQPROXY} and {FLOOR} in the same rounds of {EXPERIMENT}: run that "
            f"experiment"
        )
    return ratios
