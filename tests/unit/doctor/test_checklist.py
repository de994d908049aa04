"""The list of questions is a contract with programs that read the JSON."""

from nfqproxy.doctor.checklist import checklist
from nfqproxy.kernel.rule_settings import RuleSettings


def test_ids_are_unique_and_the_essential_ones_are_those_that_try_the_kernel() -> None:
    checks = checklist(RuleSettings())
    ids = [check.id for check in checks]
    assert len(set(ids)) == len(ids)
    essential = [check.id for check in checks if check.is_essential]
    assert essential == ["rules", "nfqueue", "ctnetlink", "self-test"]


def test_the_self_test_comes_last_and_privileges_first() -> None:
    ids = [check.id for check in checklist(RuleSettings())]
    assert (ids[0], ids[-1]) == ("privileges", "self-test")
