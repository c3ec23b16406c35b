"""Student-t quantiles against a printed table, and weighted means against their definition."""

import math
import statistics

import numpy as np
import pytest

from hici.eval.statistics import t_quantile, weighted_estimate

# two-sided, from the usual printed tables (three decimals)
TABLE = {
    (0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 4): 2.776, (0.95, 5): 2.571, (0.95, 7): 2.365,
    (0.95, 10): 2.228, (0.95, 19): 2.093, (0.95, 30): 2.042, (0.95, 60): 2.000, (0.95, 120): 1.980,
    (0.90, 1): 6.314, (0.90, 8): 1.860, (0.99, 1): 63.657, (0.99, 2): 9.925, (0.99, 9): 3.250, (0.99, 30): 2.750,
    (0.999, 5): 6.869, (0.5, 4): 0.741,
}  # fmt: skip


@pytest.mark.parametrize("key, expected", TABLE.items(), ids=lambda x: str(x))
def test_t_quantile_is_the_printed_one(key, expected):
    assert t_quantile(*key) == pytest.approx(expected, abs=5.1e-4)


def test_t_quantile_is_continuous_where_the_expansion_takes_over_and_nears_the_normal():
    assert t_quantile(0.95, 1001) == pytest.approx(t_quantile(0.95, 1000), abs=5e-6)
    assert t_quantile(0.95, 1001) < t_quantile(0.95, 1000)
    assert t_quantile(0.95, 10**9) == pytest.approx(1.959963985, abs=1e-8)


@pytest.mark.parametrize("confidence, degrees", [(0, 5), (1, 5), (0.95, 0)])
def test_t_quantile_refuses(confidence, degrees):
    with pytest.raises(ValueError, match=r"in \(0, 1\).*>= 1"):
        t_quantile(confidence, degrees)


def test_equal_weights_give_the_usual_standard_error():
    values = [1.0, 1.5, 1.25, 2.0]
    estimate = weighted_estimate(values, [7] * 4)
    error = statistics.stdev(values) / 2
    assert estimate.mean == pytest.approx(1.4375)
    assert estimate.standard_error == pytest.approx(error)
    half = 3.182446 * error
    assert estimate.interval == pytest.approx((1.4375 - half, 1.4375 + half), abs=1e-6)


def test_weights_count():
    estimate = weighted_estimate([1.0, 3.0], [3, 1])
    assert estimate.mean == 1.5
    assert estimate.standard_error == pytest.approx(math.sqrt(2 * ((0.75 * 0.5) ** 2 + (0.25 * 1.5) ** 2)))


def test_one_value_has_no_error():
    assert weighted_estimate([2.0], [5]) == (2.0, None, None)


@pytest.mark.parametrize("values, weights", [([], []), ([1.0], [1, 2]), ([1.0], [0])])
def test_weighted_estimate_refuses(values, weights):
    with pytest.raises(ValueError, match="positive weight"):
        weighted_estimate(values, weights)


def test_values_that_share_half_with_their_neighbours():
    """Means of two neighbouring independent numbers: the mean's interval covers the truth as often as it says."""
    generator, covered, plain = np.random.default_rng(2), 0, 0
    for _ in range(600):
        numbers = generator.normal(0, 1, 41)
        values = ((numbers[1:] + numbers[:-1]) / 2).tolist()
        low, high = weighted_estimate(values, [1] * 40, neighbours_depend=True).interval
        covered += low <= 0 <= high
        low, high = weighted_estimate(values, [1] * 40).interval
        plain += low <= 0 <= high
    assert 0.92 <= covered / 600 <= 0.98
    assert plain / 600 < 0.88
