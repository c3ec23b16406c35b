"""The paired difference: its intervals against what their distribution must be, and its refusals."""

import numpy as np
import pytest

from hici.eval.bootstrap import paired_difference
from hici.eval.statistics import weighted_estimate


def losses(runs, windows, spread, shift, seed=0):
    """Two [R, W] losses: windows differ much, methods by `shift` and a noise of `spread`."""
    generator = np.random.default_rng(seed)
    windows_W = generator.normal(3, 1, windows)  # cancels in the pairs
    noise_RW = generator.normal(0, spread, (runs, windows))
    noise_RW -= noise_RW.mean()
    return windows_W + shift + noise_RW, np.broadcast_to(windows_W, (runs, windows))


@pytest.mark.parametrize("windows", [6, 12, 40])
def test_one_run_agrees_with_the_t_interval_of_its_pairs(windows):
    a, b = losses(1, windows, 0.1, 0.03)
    result = paired_difference(a, b)
    expected = weighted_estimate(list((a - b)[0]), [1] * windows)
    assert result.mean == pytest.approx(0.03)
    half = (expected.interval[1] - expected.interval[0]) / 2
    assert result.interval == pytest.approx(expected.interval, abs=0.15 * half)
    assert result.by_run == pytest.approx([0.03])
    assert result.windows == windows


def test_few_windows_are_covered_as_often_as_promised():
    generator, covered, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        low, high = paired_difference(generator.normal(0, 1, (1, 6)), np.zeros((1, 6)), resamples=2000).interval
        covered += low <= 0 <= high
    assert 0.91 <= covered / trials <= 0.98  # plain percentiles: about 0.86


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", [0, 0.3, 1, 3], ids=lambda x: f"seeds-{x}")
def test_methods_without_a_difference_are_rarely_called_different_whatever_the_seeds_do(runs, spread):
    """The null of both random: windows with spread 1, seeds with `spread`, a little noise of each pair."""
    generator, trials = np.random.default_rng(runs), 400
    called = windows_alone = 0
    for _ in range(trials):
        a = generator.normal(0, spread, (runs, 1)) + generator.normal(0, 1, 24) + generator.normal(0, 0.1, (runs, 24))
        found = paired_difference(a, np.zeros((runs, 24)), resamples=400)
        called += found.distinguishable
        windows_alone += not found.interval[0] <= 0 <= found.interval[1]
    assert called / trials <= 0.07
    if spread >= 1:
        assert windows_alone / trials > 0.35  # an interval over windows says nothing of the seeds


def test_a_shift_beyond_the_noise_is_distinguishable_and_one_inside_is_not():
    assert paired_difference(*losses(1, 20, 0.02, 0.05)).distinguishable
    assert paired_difference(*losses(3, 20, 0.02, 0.05)).distinguishable
    assert paired_difference(*losses(3, 20, 0.02, -0.05)).distinguishable
    assert not paired_difference(*losses(3, 20, 0.2, 0.01)).distinguishable
    assert not paired_difference(*losses(1, 20, 0.2, 0.0)).distinguishable


def test_the_interval_with_runs_adds_the_t_half_lengths_of_runs_and_windows_in_squares():
    """By hand: runs 0.3 and 0.5, windows 0.2, 0.4 and 0.6."""
    difference = np.array([[0.1, 0.3, 0.5], [0.3, 0.5, 0.7]])
    found = paired_difference(difference + 3, np.full((2, 3), 3.0))
    assert found.by_run == pytest.approx([0.3, 0.5])
    of_runs, of_windows = 12.7062 * 0.1, 4.30265 * 0.2 / np.sqrt(3)  # t with 1 and with 2 degrees of freedom
    half = np.sqrt(of_runs**2 + of_windows**2)
    assert found.interval_with_runs == pytest.approx((0.4 - half, 0.4 + half), rel=1e-5)


def test_seeds_that_disagree_are_not_distinguishable_however_many_windows_there_are():
    a, b = losses(2, 200, 0.001, 0.01)
    assert paired_difference(a, b).distinguishable
    a = a + np.array([[0.005], [-0.005]])  # seeds +0.015 and +0.005
    result = paired_difference(a, b)
    assert result.mean == pytest.approx(0.01)
    assert result.by_run == pytest.approx([0.015, 0.005], abs=1e-3)
    assert 0.009 < result.interval[0] < result.interval[1] < 0.011  # of the windows, for these two
    assert result.interval_with_runs[0] < -0.04
    assert not result.distinguishable


def test_zero_in_either_interval_is_not_distinguishable():
    found = paired_difference(*losses(2, 9, 0.1, 0.02))
    assert not found._replace(interval=(-1.0, 1.0), interval_with_runs=(0.5, 1.0)).distinguishable
    assert not found._replace(interval=(0.5, 1.0), interval_with_runs=(-1.0, 1.0)).distinguishable
    assert found._replace(interval=(0.5, 1.0), interval_with_runs=(0.4, 1.1)).distinguishable
    assert found._replace(interval=(0.5, 1.0), interval_with_runs=None).distinguishable


def test_windows_are_drawn_for_all_runs_at_once():
    """Two identical runs know nothing more than one of other windows."""
    a, b = losses(1, 10, 0.1, 0.0)
    one, two = paired_difference(a, b), paired_difference(np.repeat(a, 2, 0), np.repeat(b, 2, 0))
    assert two.interval == pytest.approx(one.interval)
    assert one.interval_with_runs is None


def test_swapped_methods_mirror_and_the_seed_decides():
    a, b = losses(2, 9, 0.1, 0.02)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert back.mean == -forth.mean
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]), rel=0.02)
    assert back.interval_with_runs == pytest.approx((-forth.interval_with_runs[1], -forth.interval_with_runs[0]))
    assert paired_difference(a, b) == forth
    other = paired_difference(a, b, seed=1)
    assert other.interval != forth.interval
    assert other.interval_with_runs == forth.interval_with_runs  # nothing drawn


def test_blocks_do_not_change_what_is_known(monkeypatch):
    a, b = losses(2, 9, 0.1, 0.02)
    whole = paired_difference(a, b)
    monkeypatch.setattr("hici.eval.bootstrap._BLOCK_ELEMENTS", 1000)
    blocks = paired_difference(a, b)
    assert blocks.resamples == whole.resamples == 20_000
    assert blocks.interval == pytest.approx(whole.interval, abs=5e-3)


def test_one_window_has_no_interval_and_distinguishes_nothing():
    result = paired_difference(np.array([[1.0], [1.1]]), np.array([[3.0], [3.1]]))
    assert result.interval is None
    assert result.interval_with_runs is None
    assert result.mean == pytest.approx(-2.0)
    assert not result.distinguishable


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        (np.zeros((1, 3)), np.zeros((1, 4)), {}, r"shapes \(1, 3\) and \(1, 4\).*same windows"),
        (np.zeros(3), np.zeros(3), {}, r"same \[runs, windows\]"),
        (np.zeros((0, 3)), np.zeros((0, 3)), {}, r"same \[runs, windows\]"),
        (np.array([[1, np.nan]]), np.zeros((1, 2)), {}, "NaN or infinite.*leave that run out"),
        (np.zeros((1, 2)), np.zeros((1, 2)), {"resamples": 0}, "resamples=0.*>= 1"),
        (np.zeros((1, 2)), np.zeros((1, 2)), {"confidence": 1.0}, r"confidence=1.0.*\(0, 1\)"),
    ],
)
def test_refusals(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, **options)
