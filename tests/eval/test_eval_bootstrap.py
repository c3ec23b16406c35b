"""The paired bootstrap against what its distribution must be, and its refusals."""

import numpy as np
import pytest

from hici.eval.bootstrap import paired_bootstrap
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
    result = paired_bootstrap(a, b)
    expected = weighted_estimate(list((a - b)[0]), [1] * windows)
    assert result.mean == pytest.approx(0.03)
    half = (expected.interval[1] - expected.interval[0]) / 2
    assert result.interval == pytest.approx(expected.interval, abs=0.15 * half)
    assert result.by_run == pytest.approx([0.03])
    assert result.windows == windows


def test_few_windows_are_covered_as_often_as_promised():
    generator, covered, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        low, high = paired_bootstrap(generator.normal(0, 1, (1, 6)), np.zeros((1, 6)), resamples=2000).interval
        covered += low <= 0 <= high
    assert 0.91 <= covered / trials <= 0.98  # plain percentiles: about 0.86


def test_a_shift_beyond_the_noise_is_distinguishable_and_one_inside_is_not():
    assert paired_bootstrap(*losses(2, 20, 0.02, 0.05)).distinguishable
    assert paired_bootstrap(*losses(2, 20, 0.02, -0.05)).distinguishable
    assert not paired_bootstrap(*losses(2, 20, 0.2, 0.01)).distinguishable
    assert not paired_bootstrap(*losses(2, 20, 0.2, 0.0)).distinguishable


def test_seeds_that_disagree_are_not_distinguishable_however_many_windows_there_are():
    a, b = losses(2, 200, 0.001, 0.01)
    assert paired_bootstrap(a, b).distinguishable
    a = a + np.array([[0.03], [-0.03]])  # one seed +0.04, the other -0.02
    result = paired_bootstrap(a, b)
    assert result.mean == pytest.approx(0.01)
    assert result.by_run == pytest.approx([0.04, -0.02], abs=2e-3)
    assert result.interval[0] < -0.019
    assert result.interval[1] > 0.039
    assert not result.distinguishable


def test_runs_of_a_resample_share_its_windows():
    """Two identical runs know nothing more than one."""
    a, b = losses(1, 10, 0.1, 0.0)
    one, two = paired_bootstrap(a, b), paired_bootstrap(np.repeat(a, 2, 0), np.repeat(b, 2, 0))
    assert np.subtract(*two.interval) == pytest.approx(np.subtract(*one.interval), rel=0.05)


def test_swapped_methods_mirror_and_the_seed_decides():
    a, b = losses(2, 9, 0.1, 0.02)
    forth, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert back.mean == -forth.mean
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
    assert paired_bootstrap(a, b) == forth
    assert paired_bootstrap(a, b, seed=1).interval != forth.interval


def test_blocks_do_not_change_what_is_known(monkeypatch):
    a, b = losses(2, 9, 0.1, 0.02)
    whole = paired_bootstrap(a, b)
    monkeypatch.setattr("hici.eval.bootstrap._BLOCK_ELEMENTS", 1000)
    blocks = paired_bootstrap(a, b)
    assert blocks.resamples == whole.resamples == 20_000
    assert blocks.interval == pytest.approx(whole.interval, abs=5e-3)


def test_one_window_has_no_interval_and_distinguishes_nothing():
    result = paired_bootstrap(np.array([[1.0], [1.1]]), np.array([[3.0], [3.1]]))
    assert result.interval is None
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
        paired_bootstrap(a, b, **options)
