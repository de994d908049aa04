"""A result: one JSON document with everything measured and everything needed to repeat or doubt it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.observation import Observation, Parameter, Scale
from bench.provenance import Facts, provenance
from nfqproxy.errors import InputError, NfqproxyError

KIND = "nfqproxy-bench-result"
SCHEMA = 2
"""Raised with every change that an older reader would misunderstand."""

Facets = tuple[tuple[str, Parameter], ...]
"""Parameters of an observation, sorted by name: hashable."""


class Ran(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment of a run."""

    name: str
    title: str
    seconds: float
    """Wall time it took."""
    failure: str = ""
    """Why it gave no values, or none of some contenders; empty: it gave all."""
    run: str | msgspec.UnsetType = msgspec.UNSET
    """Commit and time of the run it is of, where that is not the run of the result (:func:`combined`)."""


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document."""

    kind: str
    schema: int
    commit: str | None
    is_modified: bool
    """The working tree had changes beside the commit."""
    machine: Facts
    kernel: str
    python: str
    versions: Facts
    load_average: float
    """Of the last minute when the run began: what else was running."""
    scale: Scale
    """The profile, with the seed."""
    asked: tuple[str, ...]
    """Names of the experiments that were to run."""
    ran: tuple[Ran, ...]
    """Those that ended, well or not; a run that was interrupted has not all that were asked."""
    started: str
    """UTC, ISO 8601."""
    ended: str
    observations: tuple[Observation, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all that was asked for was measured."""
        return {one.name for one in self.ran if not one.failure} == set(self.asked)

    @property
    def same_place(self) -> tuple[object, ...]:
        """What two results must have in common to be compared in absolute figures."""
        return self.machine.get("cpu"), self.machine.get("cpus"), self.kernel


def now() -> str:
    """The present, as results tell it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def begin(scale: Scale, asked: Sequence[str]) -> Result:
    """A result of this machine without any observation yet."""
    start = now()
    return msgspec.convert(
        {
            "kind": KIND,
            "schema": SCHEMA,
            **provenance(),
            "load_average": os.getloadavg()[0],
            "scale": msgspec.to_builtins(scale),
            "asked": tuple(asked),
            "ran": (),
            "started": start,
            "ended": start,
            "observations": (),
        },
        Result,
    )


def combined(first: Result, later: Result) -> Result:
    """``first``, with the experiments of ``later`` in place of its own.

    InputError unless both are of one place and one profile: else the figures would not belong together.
    """
    if (first.same_place, first.scale) != (later.same_place, later.scale):
        raise InputError(
            "the results are of different machines, kernels, profiles or seeds; report each by itself"
        )
    names = {one.name for one in later.ran}
    run = f"commit {later.commit}, {later.started} to {later.ended}, load average {later.load_average:.2f}"
    replaced = {
        one.name: msgspec.structs.replace(one, run=run if one.run is msgspec.UNSET else one.run)
        for one in later.ran
    }
    return msgspec.structs.replace(
        first,
        asked=tuple(dict.fromkeys((*first.asked, *later.asked))),
        ran=(
            *(replaced.pop(one.name, one) for one in first.ran),
            *replaced.values(),
        ),
        observations=(
            *(each for each in first.observations if each.experiment not in names),
            *later.observations,
        ),
    )


def add(
    result: Result, ran: Ran, observations: Sequence[Observation], *, ended: str | None = None
) -> Result:
    """The result with one more experiment; NfqproxyError for values that cannot be right."""
    grown = msgspec.structs.replace(
        result,
        ran=(*result.ran, ran),
        observations=(*result.observations, *observations),
        ended=ended or now(),
    )
    problem = _problem(grown)
    if problem:
        raise NfqproxyError(f"experiment {ran.name}: {problem}; mend the experiment")
    return grown


def save(result: Result, path: Path) -> None:
    """Writes it whole: a reader never meets a half."""
    write_text(path, json.dumps(msgspec.to_builtins(result), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once; :class:`InputError` if it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another") from None


def load(path: Path) -> Result:
    """A stored result; :class:`InputError` says in one sentence why a file is none."""
    document = read_document(path)
    if document.get("kind") != KIND:
        raise InputError(f"{path} is no result of `python -m bench run`; give one")
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {document.get('schema')!r}, this program reads {SCHEMA}: "
            f"measure again, or check out the commit it names"
        )
    try:
        result = msgspec.convert(document, Result)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}; measure again") from None
    # msgspec passes over unknown fields of dataclasses; a field nobody reads is one misspelt.
    problem = (
        "it holds fields that a result does not have"
        if json.loads(msgspec.json.encode(result)) != document
        else _problem(result)
    )
    if problem:
        raise InputError(f"{path}: {problem}; measure again")
    return result


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file; :class:`InputError` when there is none."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is no JSON; give a file that the bench wrote") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} is no JSON object; give a file that the bench wrote")
    return document


def facets(parameters: Mapping[str, Parameter]) -> Facets:
    """Parameters in a form that can be a key."""
    return tuple(sorted(parameters.items()))


def _problem(result: Result) -> str:
    """What is wrong with the observations; empty: nothing."""
    ran = {one.name for one in result.ran}
    seen: set[tuple[object, ...]] = set()
    for each in result.observations:
        key = (each.experiment, each.contender, each.metric, each.round, facets(each.parameters))
        where = f"{each.metric} of {each.contender} in round {each.round} of {each.experiment}"
        if each.experiment not in ran:
            return f"{where} is of an experiment that did not run"
        if not math.isfinite(each.value):
            return f"{where} is {each.value}"
        if each.round < 1:
            return f"{where}: rounds count from 1"
        if key in seen:
            return f"{where} is there twice"
        seen.add(key)
    return ""
