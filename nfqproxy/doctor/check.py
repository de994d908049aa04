"""The vocabulary: a check asks one question, a finding answers it, a result is what people read."""

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from msgspec import Struct

from nfqproxy.errors import NfqproxyError

__all__ = [
    "Check",
    "Finding",
    "Report",
    "Result",
    "Status",
    "examine",
    "fail",
    "ok",
    "unknown",
    "warn",
]

_FAILED = 1
_HOST_LACKS = 3


class Status(StrEnum):
    """How one question was answered."""

    OK = "ok"
    WARN = "warn"
    """The proxy works; something nearby will not, or not for long."""
    FAIL = "fail"
    """The proxy cannot work like this."""
    UNKNOWN = "unknown"
    """The question could not be asked; ``found`` says why."""


class Finding(Struct, frozen=True):
    """One answer. Every text is one sentence; the last two are empty when all is well."""

    status: Status
    found: str
    """What is there."""
    effect: str = ""
    """What it means for the proxy."""
    fix: str = ""
    """What to do about it."""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, found)


def warn(found: str, effect: str, fix: str) -> Finding:
    """The proxy works, but."""
    return Finding(Status.WARN, found, effect, fix)


def fail(found: str, effect: str, fix: str) -> Finding:
    """The proxy cannot work like this."""
    return Finding(Status.FAIL, found, effect, fix)


def unknown(found: str, effect: str, fix: str) -> Finding:
    """The question could not be asked."""
    return Finding(Status.UNKNOWN, found, effect, fix)


class Check(Struct, frozen=True, kw_only=True):
    """One question about the host."""

    id: str
    """Stable name for programs that read the JSON."""
    title: str
    """Name for people, a few words."""
    ask: Callable[[], Finding]
    """Finds the answer; may raise."""
    is_essential: bool = False
    """Without an answer nobody can say that the proxy works here."""


class Result(Struct, frozen=True, kw_only=True):
    """A check and its finding: one element of the JSON's ``checks``."""

    id: str
    title: str
    status: Status
    found: str
    effect: str
    fix: str


class Report:
    """The results so far, and what they come to."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._blocking: list[str] = []
        self._crashed: list[str] = []

    @property
    def is_ok(self) -> bool:
        """Whether the proxy can work: nothing failed and every essential question was answered."""
        return not self._blocking

    @property
    def exit_code(self) -> int:
        """0 it can work, 3 it cannot or nobody knows, 1 a check itself is broken."""
        if set(self._blocking) - set(self._crashed):
            return _HOST_LACKS
        return _FAILED if self._crashed else 0

    @property
    def has_crashed(self) -> bool:
        """Whether a check itself is broken."""
        return bool(self._crashed)

    def add(self, check: Check) -> Result:
        """Ask one question. An exception becomes an ``unknown`` result: the other checks go on."""
        has_crashed = False
        try:
            finding = check.ask()
        except (NfqproxyError, OSError) as error:
            finding = unknown(
                f"this could not be found out: {_sentence(error)}",
                "it may or may not be in order",
                "mend what the message names and run nfqproxy doctor again",
            )
        except Exception as error:  # an error of the check's own must not hide the other answers
            has_crashed = True
            finding = unknown(
                f"the check itself failed: {type(error).__name__}: {_sentence(error)}",
                "it may or may not be in order",
                "report this as an error of nfqproxy, with the output of nfqproxy doctor -o json",
            )
        if has_crashed:
            self._crashed.append(check.id)
        if finding.status is Status.FAIL or (
            finding.status is Status.UNKNOWN and check.is_essential
        ):
            self._blocking.append(check.id)
        result = Result(
            id=check.id,
            title=check.title,
            status=finding.status,
            found=finding.found,
            effect=finding.effect,
            fix=finding.fix,
        )
        self.results.append(result)
        return result


def examine(checks: Iterable[Check], report: Report) -> Iterator[Result]:
    """Ask all questions in order; each result is yielded as soon as it is there."""
    for check in checks:
        yield report.add(check)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
