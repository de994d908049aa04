"""The p-value against published and closed-form values."""

import math

import pytest

from nfqproxy.lab.chi_square import chi_square, upper_gamma

# Upper critical values of the chi-square distribution, NIST/SEMATECH e-Handbook 1.3.6.7.4.
CRITICAL = [
    (1, 0.10, 2.706),
    (1, 0.05, 3.841),
    (1, 0.001, 10.828),
    (2, 0.05, 5.991),
    (3, 0.01, 11.345),
    (10, 0.05, 18.307),
    (30, 0.001, 59.703),
    (100, 0.05, 124.342),
]


@pytest.mark.parametrize(("degrees", "p_value", "statistic"), CRITICAL)
def test_published_critical_values(degrees: int, p_value: float, statistic: float) -> None:
    assert upper_gamma(degrees / 2, statistic / 2) == pytest.approx(p_value, rel=1e-3)


@pytest.mark.parametrize("x", [0.0, 1e-9, 0.3, 1.0, 1.999, 2.0, 2.001, 7.0, 50.0, 300.0])
def test_closed_forms(x: float) -> None:
    """Q(1/2, x) = erfc(sqrt x); Q(1, x) = e^-x; Q(3, x) = e^-x (1 + x + x^2/2)."""
    assert upper_gamma(0.5, x) == pytest.approx(math.erfc(math.sqrt(x)), rel=1e-10, abs=1e-15)
    assert upper_gamma(1.0, x) == pytest.approx(math.exp(-x), rel=1e-10, abs=1e-15)
    expected = math.exp(-x) * (1 + x + x * x / 2)
    assert upper_gamma(3.0, x) == pytest.approx(expected, rel=1e-10, abs=1e-15)


def test_worked_example() -> None:
    """Counts 10, 20, 30 against equal weights: statistic 10, two degrees, p = e^-5."""
    result = chi_square([10, 20, 30], [1, 1, 1])
    assert result.statistic == pytest.approx(10.0)
    assert result.degrees == 2
    assert result.p_value == pytest.approx(math.exp(-5.0))


def test_exact_shares_have_p_value_one() -> None:
    assert chi_square([1500, 900, 600], [5, 3, 2]).p_value == 1.0


def test_one_backend_cannot_deviate() -> None:
    assert chi_square([100], [7]).p_value == 1.0


def test_a_drained_backend_must_stay_empty() -> None:
    assert chi_square([50, 50, 0], [1, 1, 0]).degrees == 1
    assert chi_square([50, 50, 0], [1, 1, 0]).p_value == 1.0
    assert chi_square([50, 50, 1], [1, 1, 0]).p_value == 0.0


@pytest.mark.parametrize(
    ("observed", "weights"), [([1], [1, 1]), ([0, 0], [1, 1]), ([1, 1], [0, 0]), ([1, 1], [2, -1])]
)
def test_nothing_to_test(observed: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        chi_square(observed, weights)


def test_gamma_domain() -> None:
    with pytest.raises(ValueError, match="a > 0"):
        upper_gamma(0.0, 1.0)
