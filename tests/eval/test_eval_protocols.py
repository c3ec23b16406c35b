"""The protocols of perplexity against independent computations, window by window and as whole numbers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers import VOCAB, strong_model, tiny_model
from hici.data.stream import Document
from hici.eval.measure import measure
from hici.eval.protocols import bin_edges, make_text, perplexity_plan
from hici.eval.windows import published_windows, spaced_evenly, strict_windows
from hici.models.modes import set_attention

EOS, BOS = 1, 2


def documents(*lengths, seed=3):
    generator = np.random.default_rng(seed)
    return [Document(generator.integers(3, VOCAB, length), True) for length in lengths]


def run(model, found, protocol, contexts=(32,), attentions=("full",), bos=BOS, **options):
    text = make_text(found, protocol, bos_token_id=bos, eos_token_id=EOS)
    return measure(perplexity_plan(model, text, protocol, contexts, attentions, about={}, **options))


@torch.no_grad()
def log_likelihoods(model, read, predicted):
    """Of the last len(predicted) tokens, from whole logits in float64: transformers' own forward pass."""
    logits = model(torch.tensor([read])).logits[0].double()
    return -F.cross_entropy(logits[-len(predicted) :], torch.tensor(predicted), reduction="none").numpy()


@pytest.fixture(scope="module")
def harness_windows():
    """lm-evaluation-harness's (context, continuation) windows of tokens: (tokens, prefix, context, context_len)."""
    utils = pytest.importorskip("lm_eval.utils", reason="the harness's own windows: pip install 'hici[lm-eval]'")
    return lambda *arguments: map(utils.make_disjoint_window, utils.get_rolling_token_windows(*arguments))


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    context=st.integers(2, 20),
    context_len=st.integers(1, 20),
)
def test_strict_windows_are_the_harness_s(harness_windows, lengths, context, context_len):
    """Every window reads and scores what lm-evaluation-harness's rolling windows read and score."""
    context_len = min(context_len, context)
    if max(lengths) < context:
        lengths.append(context)
    found = [list(range(1000 * i + 1, 1000 * i + 1 + length)) for i, length in enumerate(lengths)]
    stream = [token for document in found for token in [0, *document]]
    expected = []
    for document in found:
        for left, right in harness_windows(document, 0, context, context_len):
            expected.append(((left + right)[:-1], right))
    windows = strict_windows(lengths, context, context - context_len + 1)
    ours = [(stream[w.start : w.stop], stream[w.first : w.last]) for w in windows.chosen]
    assert ours == expected
    assert sum(windows.counts) == sum(lengths)


@pytest.mark.parametrize("stride", [None, 12])
@pytest.mark.parametrize("attention", ["full", "hici"])
def test_strict_is_a_sum_over_the_harness_s_windows(harness_windows, attention, stride):
    model, found = strong_model(visibility="past"), documents(70, 20, 45)
    result = run(model, found, "strict", attentions=[attention], stride=stride)
    condition = result["conditions"][0]
    set_attention(model, attention)
    total = 0.0
    for tokens, _ in found:
        for left, right in harness_windows(tokens.tolist(), BOS, 32, 1 if stride is None else 32 - stride + 1):
            total += log_likelihoods(model, (left + right)[:-1], right).sum()
    assert condition["tokens_scored"] == 70 + 20 + 45
    assert condition["mean_loss"] == pytest.approx(-total / (70 + 20 + 45), abs=1e-6)
    assert condition["ppl"] == pytest.approx(math.exp(-total / (70 + 20 + 45)), rel=1e-6)


@pytest.mark.parametrize("bos, prefix", [(BOS, BOS), (None, EOS)])
def test_a_document_s_first_token_is_predicted_from_bos_or_eos(bos, prefix):
    model, found = tiny_model(), documents(40)
    result = run(model, found, "strict", bos=bos)
    first = log_likelihoods(model, [prefix, *found[0].tokens[:31]], found[0].tokens[:32].tolist())
    assert result["conditions"][0]["losses"][0] == pytest.approx(-first.mean(), abs=1e-6)
    assert result["data"]["prefix_token_id"] == prefix


def test_strict_needs_a_token_to_begin_with():
    with pytest.raises(ValueError, match="neither BOS nor EOS.*give protocol published"):
        make_text(documents(40), "strict", bos_token_id=None, eos_token_id=None)


@pytest.mark.parametrize("attention", ["full", "hici", "hici_s2"])
@pytest.mark.parametrize("stride", [None, 16])
def test_published_is_a_mean_over_windows_of_the_model_s_own_loss(attention, stride):
    """transformers' own `labels` loss, window by window, as the published scripts have it."""
    model, found = strong_model(visibility="past"), documents(500, 150)
    result = run(model, found, "published", attentions=[attention], stride=stride)
    set_attention(model, attention)
    stream = torch.cat([torch.tensor([*tokens.tolist(), EOS]) for tokens, _ in found])
    starts = range(0, len(stream) - 32, stride or 32)  # 256 is more than a window here
    with torch.no_grad():
        losses = [model(input_ids=(x := stream[None, s : s + 32]), labels=x).loss.double().item() for s in starts]
    condition = result["conditions"][0]
    assert condition["windows"]["starts"] == list(starts)
    assert condition["mean_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert condition["losses"] == pytest.approx(losses, abs=5e-6)  # a window's mean is in float32 there
    assert condition["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


def test_published_starts():
    windows = published_windows(10_000, 1000)
    assert windows.starts == list(range(0, 9000, 256))
    assert windows.counts == [999] * 36
    assert windows.unused_tokens == 10_000 - (8960 + 1000)
    sampled = published_windows(100_000, 1000, max_windows=5)
    assert len(sampled.starts) == 5
    assert np.ptp(np.diff(sampled.starts)) <= 256  # even, but for the grid of the windows
    assert sampled.available == len(range(0, 99_000, 256))


def test_errors_of_overlapping_windows_are_over_groups():
    """Windows that share most of their tokens are no independent measurements: their plain error is far too small."""
    model, found = tiny_model(max_position_embeddings=128), documents(6000)
    overlapping = run(model, found, "published", stride=4)["conditions"][0]
    disjoint = run(model, found, "published", stride=32)["conditions"][0]
    assert overlapping["windows"]["unit"] == "group of overlapping windows"
    assert overlapping["groups"] == math.ceil((6001 - 32) / 32)
    losses = np.array(overlapping["losses"])
    naive = losses.std(ddof=1) / math.sqrt(len(losses))
    assert overlapping["standard_error"] > 1.5 * naive
    assert overlapping["standard_error"] < disjoint["standard_error"]  # more windows do tell a little more
    assert disjoint["windows"]["unit"] == "window"


def test_errors_of_many_documents_are_over_documents():
    model = tiny_model()
    found = documents(*[64] * 12)
    result = run(model, found, "strict")["conditions"][0]
    assert (result["windows"]["unit"], result["groups"]) == ("document", 12)
    assert result["interval_method"] == "bootstrap, unit: document"
    few = run(model, found[:3], "strict")["conditions"][0]
    assert (few["windows"]["unit"], few["groups"]) == ("window", 6)
    low, high = few["loss_interval"]
    assert low < few["mean_loss"] < high
    assert few["ppl_interval"] == [math.exp(low), math.exp(high)]


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_position_bins_are_means_of_positions(attention):
    model, found = strong_model(visibility="past"), documents(210)
    condition = run(model, found, "position", attentions=[attention])["conditions"][0]
    set_attention(model, attention)
    stream = [*found[0].tokens.tolist(), EOS]
    losses = np.array([-log_likelihoods(model, stream[s : s + 31], stream[s + 1 : s + 32]) for s in range(0, 180, 32)])
    assert [bin_["first"] for bin_ in condition["bins"]] == [1, 2, 3, 4, 6, 8, 11, 16, 23]
    assert condition["bins"][-1]["last"] == 31
    for bin_ in condition["bins"]:
        part = losses[:, bin_["first"] - 1 : bin_["last"]]
        assert bin_["mean_loss"] == pytest.approx(part.mean(), abs=1e-6)
        assert bin_["tokens"] == part.size
        error = part.mean(axis=1).std(ddof=1) / math.sqrt(6)
        assert bin_["standard_error"] == pytest.approx(error, abs=1e-6)
    whole = sum(bin_["mean_loss"] * bin_["tokens"] for bin_ in condition["bins"]) / losses.size
    assert whole == pytest.approx(condition["mean_loss"], abs=1e-9)


@given(st.integers(2, 100_000))
def test_bins_cover_all_positions_once(context):
    edges = bin_edges(context)
    assert edges[0] == 1
    assert edges[-1] == context
    assert all(a < b for a, b in pairwise(edges))


def test_conditions_of_several_lengths_and_attentions():
    model, found = strong_model(visibility="all"), documents(200)
    result = run(model, found, "strict", contexts=[24, 48], attentions=["full", "hici"])
    told = [(c["context"], c["attention"], c["visibility"], c["causal"], c["segments"]) for c in result["conditions"]]
    assert told == [
        (24, "full", None, True, None), (24, "hici", "all", False, 3),
        (48, "full", None, True, None), (48, "hici", "all", False, 6),
    ]  # fmt: skip
    first = result["paired_differences"][0]
    gaps = np.array(result["conditions"][1]["losses"]) - np.array(result["conditions"][0]["losses"])
    weights = np.array(result["conditions"][0]["counts"])
    assert first["loss_difference"] == pytest.approx(np.average(gaps, weights=weights))
    assert result["conditions"][0]["peak_memory_bytes"] > 2**20
    assert (result["task"], result["protocol"]["name"]) == ("perplexity", "strict")


def test_sampled_windows_are_recorded():
    result = run(tiny_model(), documents(700), "strict", max_windows=4)
    condition = result["conditions"][0]
    assert (len(condition["losses"]), condition["windows"]["available"]) == (4, 22)
    assert result["protocol"]["max_windows"] == 4


@pytest.mark.parametrize(
    "lengths, protocol, options, message",
    [
        ((30, 20), "strict", {}, "longest document has 30 tokens, fewer than one window of 32"),
        ((31,), "published", {}, "has 32 tokens, fewer than one window of 33"),
        ((20,), "position", {}, "has 21 tokens, fewer than one window of 32"),
        ((90,), "strict", {"stride": 33}, r"stride=33 is not in 1\.\.32"),
        ((90,), "position", {"stride": 8}, "stride=8 with protocol position.*drop it"),
        ((90,), "strict", {"max_windows": 0}, "max_windows=0 is below 1"),
        ((90,), "strikt", {}, "unknown perplexity protocol 'strikt'.*Did you mean 'strict'"),
    ],
    ids=str,
)
def test_refusals(lengths, protocol, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model(), documents(*lengths), protocol, **options)


def test_spaced_evenly():
    assert spaced_evenly(10, 3) == [1, 5, 8]
    assert spaced_evenly(4, 9) == [0, 1, 2, 3]
