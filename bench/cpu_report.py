"""The result of ``cpu``: medians over the rounds, as data and as a table."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from bench.contenders import CONTENDERS
from bench.cpu import Config, Sample

_YARDSTICK = "c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A measure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        ordered = sorted(values)
        return cls(median=statistics.median(ordered), least=ordered[0], most=ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One contender; times in us of CPU per connection."""

    contender: str
    worker_us: Spread | None
    """None: no userspace."""
    worker_user_us: float | None
    """The median's user part, divided by the ratio of user to system ticks over all rounds."""
    worker_system_us: float | None
    ratio_to_c: Spread | None
    """Of worker time, formed round by round; None without a C reference in the run."""
    supervisor_us: Spread | None
    """None: there is none, or it never ran."""
    kernel_threads_us: Spread
    """kworkers and ksoftirqd of the machine: work that was put off."""
    sender_us: Spread
    path_us: Spread
    """Worker, supervisor, kernel threads and sender."""
    machine_us: Spread
    """Everything that ran on the machine."""


def summarize(samples: list[Sample]) -> list[Summary]:
    """One summary per contender, in the order of the table of contenders."""
    return [_summary(name, samples) for name in CONTENDERS if any(_of(name, samples))]


def _of(name: str, samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.contender == name]


def _summary(name: str, samples: list[Sample]) -> Summary:
    own = _of(name, samples)

    def spread(measure: Callable[[Sample], float]) -> Spread:
        return Spread.of(measure(sample) for sample in own)

    worker = spread(lambda sample: sample.worker_us)
    has_worker = worker.most > 0
    user = sum(sample.worker.user_ticks for sample in own)
    ticks = user + sum(sample.worker.system_ticks for sample in own)
    user_us = worker.median * user / ticks if ticks else 0.0
    yardstick = {sample.round: sample.worker_us for sample in _of(_YARDSTICK, samples)}
    has_others = any(sample.other_ns for sample in own)
    return Summary(
        contender=name,
        worker_us=worker if has_worker else None,
        worker_user_us=user_us if has_worker else None,
        worker_system_us=worker.median - user_us if has_worker else None,
        ratio_to_c=(
            spread(lambda sample: sample.worker_us / yardstick[sample.round])
            if has_worker and yardstick
            else None
        ),
        supervisor_us=spread(lambda sample: sample.other_us) if has_others else None,
        kernel_threads_us=spread(lambda sample: sample.deferred_us),
        sender_us=spread(lambda sample: sample.sender_us),
        path_us=spread(lambda sample: sample.path_us),
        machine_us=spread(lambda sample: sample.machine_us),
    )


def as_data(
    samples: list[Sample], config: Config, provenance: dict[str, object]
) -> dict[str, object]:
    """The result as JSON-able data, raw samples included."""
    return {
        "experiment": "cpu",
        **provenance,
        "config": asdict(config),
        "unit": "microseconds of CPU per connection in summary, nanoseconds per round in samples",
        "summary": [asdict(summary) for summary in summarize(samples)],
        "samples": [asdict(sample) for sample in samples],
    }


def as_table(samples: list[Sample], config: Config) -> Table:
    """The result for a person: medians, and for the worker how far the rounds were apart."""
    table = Table(
        title=(
            f"CPU per new TCP connection in us, median of {config.rounds} rounds of "
            f"{config.connections:,} connections"
        ),
        caption=(
            "Every connection was checked: one right conntrack entry, arrived at its backend, "
            "shares as the weights say, nothing dropped. x C: worker against the C reference, "
            "round by round. super: the contender's supervisor. kthread: kworkers and ksoftirqd. "
            "path: worker + super + kthread + sender. machine: all that ran meanwhile."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("contender", no_wrap=True)
    columns = ("worker", "least..most", "user", "system", "x C", "super", "kthread", "sender")
    for column in (*columns, "path", "machine"):
        table.add_column(column, justify="right", no_wrap=True)
    for summary in summarize(samples):
        worker = summary.worker_us
        cells = (
            worker,
            worker and f"{worker.least:.2f}..{worker.most:.2f}",
            summary.worker_user_us,
            summary.worker_system_us,
            summary.ratio_to_c,
            summary.supervisor_us,
            summary.kernel_threads_us,
            summary.sender_us,
            summary.path_us,
            summary.machine_us,
        )
        table.add_row(summary.contender, *(_cell(value) for value in cells))
    return table


def _cell(value: Spread | float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, Spread):
        value = value.median
    return value if isinstance(value, str) else f"{value:.2f}"
