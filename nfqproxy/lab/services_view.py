"""How the scenario ``services`` looks on a terminal: a paragraph per probe, a table at the end."""

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from nfqproxy.lab.attempt import Outcome
from nfqproxy.lab.experiment import ProbeResult, Run, StepResult
from nfqproxy.lab.stage import Step
from nfqproxy.lab.two_nodes import TwoNodes
from nfqproxy.lab.view import new_table, verdict_word

__all__ = ["Narrator", "show_run"]

_BAR = 24
_LABEL = 10
_INDENT = 4
_NARROWEST = 30
_OUTCOMES = {
    Outcome.REFUSED.value: "refused: ICMP port unreachable",
    Outcome.DROPPED.value: "nothing: silently dropped",
    Outcome.FAILED.value: "failed",
}


def _mark(ok: bool) -> Text:
    return Text("✓ ", style="bold green") if ok else Text("✗ ", style="bold red")


class Narrator:
    """Prints what happens as it happens."""

    def __init__(
        self, console: Console, *, announce: Callable[[str], None], pause: Callable[[], None]
    ) -> None:
        """``announce`` is told of each step and situation; ``pause`` is called at a step's end."""
        self._console = console
        self._announce = announce
        self._pause = pause

    def opening(self, lab: TwoNodes) -> None:
        """Who there is."""
        built = lab.topology
        near, far = (" and ".join(pod.name for pod in pods) for pods in (lab.near, lab.far))
        outside = ", ".join(f"{each.name} {each.address4}" for each in built.clients)
        first, second = (f"{node.name} {node.address4}" for node in built.nodes)
        self._console.print()
        self._row("outside", Text(outside))
        self._row(
            "inside",
            Text(
                f"{first}, which runs nfqproxy; its pods {near} serve, {lab.caller.name} is a"
                f" client; {second}, whose pods {far} serve"
            ),
        )

    def step_begins(self, number: int, step: Step) -> None:
        """A heading and the point of the step."""
        self._announce(f"step {number}: {step.title}")
        self._console.print()
        self._console.print(Text(f"{number:>2}  {step.title}", style="bold"))
        self._print(" " * _INDENT, Text(step.point, style="dim"))

    def situation(self, title: str) -> None:
        """What has changed."""
        self._announce(f"  {title}")
        self._print(" " * _INDENT + "-- ", Text(title, style="cyan"))

    def probe(self, result: ProbeResult) -> None:
        """What was sent, what came of it, what was expected, and why."""
        arrow = f" -> {result.seen[0].to}" if result.seen else ""
        text = Text(f"{result.source}{arrow}: {result.sent}")
        self._print(Text(" " * _INDENT) + _mark(result.ok), text)
        for label, line in _lines(result):
            self._row(label, line)

    def step_ends(self, result: StepResult) -> None:
        """Time to look around."""
        del result
        self._pause()

    def _row(self, label: str, text: Text) -> None:
        self._print(Text(" " * (_INDENT + 2) + label.ljust(_LABEL), style="dim"), text)

    def _print(self, head: Text | str, text: Text) -> None:
        """Text wrapped beside its head."""
        head = Text(head) if isinstance(head, str) else head
        width = max(_NARROWEST, self._console.width - len(head))
        for line in text.wrap(self._console, width):
            line.rstrip()
            self._console.print(head + line, soft_wrap=True)
            head = Text(" " * len(head))


def _lines(result: ProbeResult) -> Iterator[tuple[str, Text]]:
    backends = result.total("backends")
    answered = sum(backends.values())
    label = "reached"
    for name, count in backends.items():
        filled = max(1, round(_BAR * count / answered))
        bar = Text("█" * filled, style="green") + Text("░" * (_BAR - filled), style="dim")
        yield label, Text(f"{name}  ") + bar + Text(f" {count / answered:4.0%}  {count}")
        label = ""
    for name, count in result.total("outcomes").items():
        if name in _OUTCOMES:
            problems = ", ".join(result.total("problems"))
            text = _OUTCOMES[name] + (f": {problems}" if problems else "")
            yield "got", Text(f"{count} x {text}" if answered else text)
    if result.answer:
        yield "got", Text(result.answer)
    seen_as = list(result.total("seen_as"))
    if seen_as:
        yield "seen as", Text(_shortened(seen_as))
    yield "expected", Text(result.expected)
    for problem in result.problems:
        yield "wrong", Text(problem, style="red")
    if result.explained:
        yield "why", Text(result.explained[0].reason, style="italic")


def _shortened(addresses: list[str], most: int = 4) -> str:
    more = f" and {len(addresses) - most} more" if len(addresses) > most else ""
    return ", ".join(addresses[:most]) + more


def show_run(run: Run, console: Console) -> None:
    """The summary and the verdict."""
    table = new_table("Summary")
    table.add_column("", justify="right")
    table.add_column("step", no_wrap=True)
    table.add_column("expectations\nmet", justify="right")
    table.add_column("")
    for step in run.steps:
        met = sum(probe.ok for probe in step.probes)
        table.add_row(str(step.number), step.title, f"{met} of {len(step.probes)}", _mark(step.ok))
    console.print()
    console.print(table)
    console.print()
    wrong = [str(step.number) for step in run.steps if not step.ok]
    where = f"; see step {', '.join(wrong)}" if wrong else ""
    steps = "1 step" if len(run.steps) == 1 else f"{len(run.steps)} steps"
    console.print(
        f"{verdict_word(run.ok)}  {steps}, {run.connections:,} connections,"
        f" {run.elapsed_s:.1f} s{where}",
        soft_wrap=True,
    )
