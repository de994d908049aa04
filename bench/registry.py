"""The experiments that ``python -m bench run`` knows, in the order in which they run.

One line each: its name and where its class is. Modules are imported when an experiment is asked for.
"""

import importlib
from collections.abc import Iterable

from bench.observation import Experiment
from nfqproxy.errors import InputError

EXPERIMENTS: dict[str, str] = {
    "programming": "bench.experiments.programming:Programming",
    "memory": "bench.experiments.memory:Memory",
}


def experiment(name: str) -> Experiment:
    """A new experiment of that name; :class:`InputError` lists the known names."""
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise InputError(f"no experiment is named {name!r}: choose from {known}")
    module, _, attribute = EXPERIMENTS[name].partition(":")
    made: Experiment = getattr(importlib.import_module(module), attribute)()
    return made


def experiments(names: Iterable[str]) -> list[Experiment]:
    """The named experiments, each once, in the order given."""
    return [experiment(name) for name in dict.fromkeys(names)]
