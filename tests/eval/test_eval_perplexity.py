"""Perplexity against logits of the model, the window protocol, and paired differences."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import SEGMENT, VOCAB, strong_model, tiny_model
from hici.eval.perplexity import paired_difference, perplexity
from hici.eval.windows import disjoint_windows
from hici.models.attach import reconfigure
from hici.models.lookup import attention_mode
from hici.models.modes import leaks_future, set_attention, visibility_in_use


def stream(tokens=150, seed=3):
    return np.random.default_rng(seed).integers(0, VOCAB, tokens)


@torch.no_grad()
def naive_losses(model, tokens, starts, context, scored):
    """Mean cross entropy of the last `scored` targets of each window, from whole logits in float64."""
    losses = []
    for start, count in zip(starts, scored, strict=True):
        ids = torch.from_numpy(tokens[start : start + context])
        logits = model(ids[None]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits[-count:], ids[1:][-count:]).item())
    return losses


@pytest.mark.parametrize("attention", ["full", "hici", "hici_s2"])
@pytest.mark.parametrize("stride", [None, 12])
def test_losses_are_those_of_the_logits(attention, stride):
    model, tokens = strong_model(visibility="past"), stream()
    set_attention(model, attention)
    result = perplexity(model, tokens, 40, stride=stride)
    starts = list(range(0, 111, stride or 40))
    counts = [39] + [min(stride or 40, 39)] * (len(starts) - 1)
    assert (result.windows.starts, result.counts, result.attention) == (starts, counts, attention)
    expected = naive_losses(model, tokens, starts, 40, counts)
    assert result.losses == pytest.approx(expected, abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(np.average(expected, weights=counts)), rel=1e-5)


def test_attention_modes_differ():
    model, tokens = strong_model(visibility="past"), stream()
    losses = {}
    for attention in ("full", "hici", "hici_s2"):
        set_attention(model, attention)
        losses[attention] = perplexity(model, tokens, 40).loss.mean
    assert min(abs(losses["full"] - losses["hici"]), abs(losses["hici"] - losses["hici_s2"])) > 1e-3


def test_strided_windows_score_every_token_once():
    windows = disjoint_windows(103, context=20, stride=7)
    scored = []
    for window in windows.chosen:
        assert (window.stop, window.last) == (window.start + 20, window.start + 20)
        scored += range(window.first, window.last)
    last = windows.starts[-1] + 20
    assert scored == list(range(1, last))  # all but the stream's first token, each exactly once
    assert windows.unused_tokens == 103 - last < 7


ALL_TEN = list(range(0, 100, 10))


@pytest.mark.parametrize(
    "count, starts",
    [(1, [50]), (2, [20, 70]), (3, [10, 50, 80]), (5, [10, 30, 50, 70, 90]), (10, ALL_TEN), (99, ALL_TEN)],
)
def test_max_windows_are_spaced_evenly(count, starts):
    windows = disjoint_windows(105, context=10, max_windows=count)
    assert windows.starts == starts
    assert (windows.available, windows.unused_tokens) == (10, 5)


def test_a_chosen_window_of_a_strided_stream_scores_only_its_last_tokens():
    windows = disjoint_windows(200, context=20, stride=5, max_windows=3)
    assert 0 not in windows.starts
    assert all(start % 5 == 0 for start in windows.starts)
    assert windows.counts == [5, 5, 5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"context": 200}, r"data has 150 tokens, fewer than one window of 200; give more text"),
        ({"context": 1}, r"context=1 is below 2"),
        ({"context": 40, "stride": 41}, r"stride=41 is not in 1\.\.40"),
        ({"context": 40, "stride": 0}, r"stride=0 is not in 1\.\.40"),
        ({"context": 40, "max_windows": 0}, r"max_windows=0 is below 1"),
        ({"context": 140}, r"140 tokens are more than the 128 positions"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model(), stream(), **arguments)


def test_beyond_the_rope_when_allowed():
    assert len(perplexity(tiny_model(), stream(), 140, allow_beyond_rope=True).losses) == 1


def test_a_token_outside_of_the_vocabulary():
    tokens = stream()
    tokens[7] = VOCAB
    with pytest.raises(ValueError, match=rf"token {VOCAB}.*{VOCAB} entries"):
        perplexity(tiny_model(), tokens, 40)


def test_a_loss_that_is_not_finite():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"window at token 0 is nan.*--dtype float32"):
        perplexity(model, stream(), 40)


@pytest.mark.parametrize("visibility, leaks", [("all", True), ("current", True), ("past", False)])
def test_a_perplexity_that_sees_the_future_is_marked_and_warned_about(visibility, leaks, caplog):
    model = strong_model(visibility=visibility)
    with caplog.at_level(logging.WARNING, logger="hici.eval.perplexity"):
        result = perplexity(model, stream(), 40)
    assert (result.visibility, result.leaks_future) == (visibility, leaks)
    assert result.to_dict()["leaks_future"] is leaks
    assert ("sees its own future" in caplog.text or "see a summary of its own future" in caplog.text) is leaks
    set_attention(model, "full")
    assert not perplexity(model, stream(), 40).leaks_future


def test_the_mark_is_true_to_the_model():
    """Changing the last token of a window moves the loss of an earlier one exactly where `leaks_future` says so."""
    for visibility in ("all", "current", "past"):
        model = strong_model(visibility=visibility)
        ids = torch.from_numpy(stream(3 * SEGMENT))[None]
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % VOCAB
        with torch.no_grad():
            moved = not torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])
        assert moved is leaks_future(model)


def test_without_slots_there_is_no_visibility_and_no_leak():
    model = strong_model(visibility="all")
    reconfigure(model, use_global=False, use_local=False)
    assert visibility_in_use(model) is None
    assert not leaks_future(model)


def test_the_model_is_left_as_it_was():
    model = strong_model(visibility="past").train()
    perplexity(model, stream(), 40)
    assert model.training
    assert attention_mode(model) == "hici"


def test_progress_counts_windows():
    seen = []
    perplexity(tiny_model(), stream(), 40, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_paired_difference_is_over_windows():
    model, tokens = strong_model(visibility="past"), stream()
    a = perplexity(model, tokens, 20)
    set_attention(model, "full")
    b = perplexity(model, tokens, 20)
    gaps = np.array(a.losses) - np.array(b.losses)
    estimate = paired_difference(a, b)
    assert estimate.mean == pytest.approx(gaps.mean())
    assert estimate.mean == pytest.approx(a.loss.mean - b.loss.mean)
    assert estimate.standard_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(len(gaps)))
    assert paired_difference(a, a) == (0.0, 0.0, (0.0, 0.0))


def test_paired_difference_refuses_other_windows_and_other_data():
    model, tokens = tiny_model(), stream()
    a = perplexity(model, tokens, 20)
    for other, what in (
        (perplexity(model, tokens, 20, max_windows=2), "windows"),
        (perplexity(model, tokens, 20, stride=10), "context and stride"),
        (perplexity(model, stream(seed=4), 20), "data"),
    ):
        with pytest.raises(ValueError, match=f"needs the same {what}"):
            paired_difference(a, other)


def test_to_dict_holds_everything():
    result = perplexity(strong_model(visibility="past"), stream(), 40)
    values = result.to_dict()
    assert {field.name for field in dataclasses.fields(result)} <= set(values)
    assert values["tokens_scored"] == 3 * 39
    assert (values["segment_size"], values["segments"]) == (SEGMENT, 5)
    assert values["ppl_interval"][0] < values["ppl"] < values["ppl_interval"][1]
    assert len(values["stream_sha256"]) == 64


def test_set_attention_refuses():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"unknown attention 'hicy'.*Did you mean 'hici'"):
        set_attention(model, "hicy")
    with pytest.raises(ValueError, match=r"without HiCI modules; call hici\.attach"):
        set_attention(model, "hici")
