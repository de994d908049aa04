"""Runs experiments one after the other and keeps what was measured, whatever happens to the rest.

After every experiment the result is written whole, so that Ctrl-C, a crash or a power cut costs the
experiment under way and nothing before it. A contender with which connections went wrong gives no values,
an experiment that failed otherwise none at all; the sentence stands in the result, and the others run all
the same.
"""

import time
import traceback
from collections.abc import Callable, Sequence

import msgspec

from bench import result as results
from bench.observation import Experiment, Observation, Scale
from bench.result import Ran, Result
from bench.stands import WrongResultError
from nfqproxy.errors import NfqproxyError


def run(
    experiments: Sequence[Experiment],
    scale: Scale,
    progress: Callable[[str], None],
    keep: Callable[[Result], None],
) -> Result:
    """All experiments; ``keep`` is called with the result so far after each."""
    result = results.begin(scale, [one.name for one in experiments])
    for number, experiment in enumerate(experiments, 1):
        start = time.monotonic()
        observations, failure = _observe(
            experiment, scale, progress, prefix=f"[{number}/{len(experiments)}] {experiment.name}: "
        )
        ran = Ran(
            name=experiment.name,
            title=experiment.title,
            seconds=round(time.monotonic() - start, 1),
            failure=failure,
        )
        try:
            result = results.add(result, ran, observations)
        except NfqproxyError as error:
            result = results.add(result, msgspec.structs.replace(ran, failure=str(error)), ())
        keep(result)
    return result


def _observe(
    experiment: Experiment, scale: Scale, progress: Callable[[str], None], *, prefix: str
) -> tuple[list[Observation], str]:
    """The observations, or why there are none."""
    try:
        observations = experiment.run(scale, lambda line: progress(prefix + line))
    except WrongResultError as error:
        return list(error.kept), str(error)
    except NfqproxyError as error:
        return [], str(error)
    except Exception as error:
        traceback.print_exc()
        return [], f"{type(error).__name__}: {error}"
    return observations, "" if observations else "it observed nothing"
