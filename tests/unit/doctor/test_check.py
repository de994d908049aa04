"""What the answers come to, and that one broken check hides nothing."""

import pytest

from nfqproxy.doctor.check import Check, Finding, Report, Status, examine, fail, ok, unknown, warn
from nfqproxy.errors import HostError, KernelError

OK = ok("fine")
WARN = warn("odd", "so", "do")
FAIL = fail("bad", "so", "do")
UNKNOWN = unknown("dark", "so", "do")


def check(finding: Finding | Exception, *, is_essential: bool = False) -> Check:
    def ask() -> Finding:
        if isinstance(finding, Exception):
            raise finding
        return finding

    return Check(id="one", title="One", ask=ask, is_essential=is_essential)


@pytest.mark.parametrize(
    ("checks", "is_ok", "exit_code"),
    [
        ([], True, 0),
        ([check(OK), check(WARN)], True, 0),
        ([check(OK), check(FAIL)], False, 3),
        ([check(UNKNOWN)], True, 0),
        ([check(UNKNOWN, is_essential=True)], False, 3),
        ([check(HostError("no root"))], True, 0),
        ([check(HostError("no root"), is_essential=True)], False, 3),
    ],
)
def test_exit_code(checks: list[Check], is_ok: bool, exit_code: int) -> None:
    report = Report()
    assert len(list(examine(checks, report))) == len(checks)
    assert (report.is_ok, report.exit_code) == (is_ok, exit_code)
    assert not report.has_crashed


@pytest.mark.parametrize("error", [HostError("x is absent;\n install it"), OSError(13, "Denied")])
def test_an_expected_error_is_unknown_and_the_rest_goes_on(error: Exception) -> None:
    report = Report()
    first, second = examine([check(error), check(OK)], report)
    assert first.status is Status.UNKNOWN
    assert first.found == f"this could not be found out: {' '.join(str(error).split())}"
    assert first.effect
    assert first.fix
    assert second.status is Status.OK


def test_a_kernel_error_keeps_operation_and_errno() -> None:
    (result,) = examine([check(KernelError("bind queue 7", 12))], Report())
    assert "bind queue 7: Cannot allocate memory (ENOMEM)" in result.found


@pytest.mark.parametrize("is_essential", [True, False])
def test_a_broken_check_is_exit_1(is_essential: bool) -> None:
    report = Report()
    first, second = examine(
        [check(ZeroDivisionError(), is_essential=is_essential), check(OK)], report
    )
    assert first.found == "the check itself failed: ZeroDivisionError: ZeroDivisionError"
    assert second.status is Status.OK
    assert report.has_crashed
    assert report.exit_code == 1
    assert report.is_ok is not is_essential


def test_a_lacking_host_outweighs_a_broken_check() -> None:
    report = Report()
    list(examine([check(ZeroDivisionError(), is_essential=True)], report))
    report.add(Check(id="two", title="Two", ask=lambda: FAIL))
    assert report.exit_code == 3


def test_an_interrupt_is_no_answer() -> None:
    def ask() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Report().add(Check(id="one", title="One", ask=ask))
