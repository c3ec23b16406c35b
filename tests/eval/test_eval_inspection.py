"""Shares and similarities of a model against direct computations, how means are taken, and what is refused."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hici
from helpers import SEGMENT, VOCAB, golden_model, strong_model, tiny_model
from hici.core.broadcast import build_slots
from hici.core.segments import to_segments
from hici.eval.inspection import inspection_plan, slot_likeness, slot_similarity
from hici.eval.measure import measure
from hici.eval.results import read_result
from hici.models.attach import reconfigure
from hici.models.lookup import attention_modules
from hici.models.modes import set_attention

CONTEXT = 3 * SEGMENT + 5
SIZES = [SEGMENT, SEGMENT, SEGMENT, 5]
KINDS = ("global", "local", "tokens")


def stream(tokens=150, seed=3):
    return np.random.default_rng(seed).integers(0, VOCAB, tokens)


def inspect(model, tokens=None, context=CONTEXT, **options):
    record = measure(inspection_plan(model, stream() if tokens is None else tokens, context, **options))
    return record["conditions"][0], record


@torch.no_grad()
def dense_weights(model, ids):
    """[(weights [H, T, slots of all segments + T], P)] of every layer of a Llama, with slots made from its inputs.

    By the model's own projections and its stock rotary function, one float64 softmax over all keys: no code of ours but
    the slots themselves.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found, config = [], attention_modules(model)[0].hici_config

    def look(module, args, kwargs):
        hidden = kwargs["hidden_states"]
        length, width = hidden.shape[1], module.head_dim
        q, k = (p(hidden).view(1, length, -1, width).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        real = (torch.arange(len(SIZES) * SEGMENT) < length).view(1, len(SIZES), SEGMENT)
        how = {name: getattr(config, name) for name in ("visibility", "use_global", "use_local")}
        makers = module.local_constructor, module.global_integrator
        slots = build_slots(to_segments(hidden, SEGMENT), real, *makers, **how)[0]
        rows, number = slots.shape[:2]
        slot_k = module.k_proj(slots.flatten(0, 1)).view(1, rows * number, -1, width).transpose(1, 2)
        keys = torch.cat((slot_k, k), dim=2).double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        segment = torch.arange(length) // SEGMENT
        of_slot = torch.arange(len(SIZES) - rows, len(SIZES)).repeat_interleave(number)
        causal = torch.ones(length, length).tril().bool() & (segment[:, None] == segment)
        visible = torch.cat((segment[:, None] == of_slot, causal), dim=1)
        scores = (q.double() @ keys.mT / math.sqrt(width)).masked_fill(~visible, -torch.inf)
        found.append((scores.softmax(-1)[0], rows * number, number))

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in attention_modules(model)]
    model(torch.from_numpy(ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def direct_shares(model, ids, queries):
    """{kind: [layer][head]} over the queries (bool [T]), from the dense weights."""
    config = attention_modules(model)[0].hici_config
    shares = {kind: [] for kind in KINDS}
    for weights, slots, number in dense_weights(model, ids):
        mean = weights[:, queries].mean(1)
        is_global = torch.arange(slots) % number < config.num_global_slots * config.use_global
        shares["global"].append(mean[:, :slots][:, is_global].sum(-1).tolist())
        shares["local"].append(mean[:, :slots][:, ~is_global].sum(-1).tolist())
        shares["tokens"].append(mean[:, slots:].sum(-1).tolist())
    return shares


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("use", [{}, {"use_local": False}, {"use_global": False}], ids=["both", "global", "local"])
@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_shares_are_those_of_dense_weights(visibility, use):
    model, tokens = strong_model(visibility=visibility, **use), stream()
    found, record = inspect(model, tokens)
    start = record["protocol"]["windows"]["starts"][0]
    ids, place = tokens[start : start + CONTEXT], torch.arange(CONTEXT)
    seeing = place >= SEGMENT * (visibility == "past")
    for name, queries in (("shares", seeing), ("shares_all_tokens", place >= 0)):
        expected = direct_shares(model, ids, queries)
        for kind in KINDS:
            close(found[name][kind], expected[kind])
        close(sum(np.array(found[name][kind]) for kind in KINDS), np.ones((2, 4)))
    for i in range(len(SIZES)):
        expected = direct_shares(model, ids, place // SEGMENT == i)
        for kind in KINDS:
            close(np.array(found["by_segment"][kind])[:, i], np.mean(expected[kind], axis=1))
    assert (np.max(found["shares"]["global"]) > 0.01) == ("use_global" not in use)
    assert (np.max(found["shares"]["local"]) > 0.01) == ("use_local" not in use)
    assert (found["segment_tokens"], found["layers"], found["layer_numbers"]) == (SIZES, 2, [0, 1])


def test_the_first_tokens_share_is_a_part_of_the_tokens():
    model, tokens = strong_model(visibility="past"), stream()
    found, record = inspect(model, tokens)
    start = record["protocol"]["windows"]["starts"][0]
    place = torch.arange(CONTEXT)
    for layer, (weights, slots, _) in enumerate(dense_weights(model, tokens[start : start + CONTEXT])):
        first = weights[:, place, slots + place // SEGMENT * SEGMENT]
        close(found["first_token"][layer], first[:, SEGMENT:].mean(1).tolist())
        for i, part in enumerate(first.split(SEGMENT, dim=1)):
            close(found["by_segment"]["first_token"][layer][i], part.mean().item())
    assert (np.array(found["first_token"]) < np.array(found["shares"]["tokens"])).all()


@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_slot_similarity_is_that_of_the_slots(visibility):
    model, tokens = strong_model(visibility=visibility), stream()
    made = {"local": [], "global": []}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _m, _a, out, kind=kind: made[kind].append(out[0]))
        for attention in attention_modules(model)
        for kind, name in (("local", "local_constructor"), ("global", "global_integrator"))
    ]
    found, _ = inspect(model, tokens)
    for hook in hooks:
        hook.remove()
    n = 4 - (visibility == "past")
    for kind, count in (("local", n), ("global", 1 if visibility == "all" else n)):
        for layer, slots in enumerate(made[kind]):
            slots = slots.detach().double().reshape(count, -1, 64)
            m = slots.shape[1]
            for i in range(count):
                for j in range(count):
                    cosine = F.cosine_similarity(slots[i], slots[j], dim=-1).mean()
                    assert found["slot_similarity"][kind][layer][i][j] == pytest.approx(cosine.item(), abs=1e-9)
            pairs = [F.cosine_similarity(slots[i, a], slots[i, b], dim=0).item()
                     for i in range(count) for a in range(m) for b in range(m) if a != b]  # fmt: skip
            assert found["slot_likeness"][kind][layer] == pytest.approx(np.mean(pairs), abs=1e-9)
    across = np.array(found["slot_similarity"]["local"])
    assert across[:, ~np.eye(n, dtype=bool)].max() < 0.999  # else every test above would pass with ones


def test_similarity_of_known_slots():
    up, right = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])
    slots = torch.stack([torch.stack([up, right]), torch.stack([up, -right]), torch.stack([right, right])]).double()
    expected = [[1, 0, 0.5], [0, 1, -0.5], [0.5, -0.5, 1]]
    close(slot_similarity(slots).tolist(), expected)
    assert slot_likeness(slots) == pytest.approx(1 / 3)  # 0, 0 and 1
    assert slot_likeness(slots[:, :1]) is None
    assert slot_likeness(slots[:0]) is None
    assert slot_similarity(slots[:0]).tolist() == []


def test_a_window_is_a_part_and_the_result_their_mean():
    model, tokens = strong_model(visibility="past"), stream(200)
    found, record = inspect(model, tokens, windows=3)
    starts = record["protocol"]["windows"]["starts"]
    assert starts == [CONTEXT, 3 * CONTEXT, 5 * CONTEXT]  # of six
    assert record["protocol"]["windows"]["available"] == 6
    singles = [inspect(model, tokens[start : start + CONTEXT])[0] for start in starts]
    for kind in KINDS:
        close(found["shares"][kind], np.mean([each["shares"][kind] for each in singles], axis=0), 1e-12)
        close(found["by_window"][kind], [np.mean(each["shares"][kind]) for each in singles], 1e-12)
    for name in ("slot_similarity", "slot_likeness"):
        for kind in ("local", "global"):
            close(found[name][kind], np.mean([each[name][kind] for each in singles], axis=0), 1e-12)
    assert len({round(each["shares"]["global"][0][0], 6) for each in singles}) == 3


def test_some_layers():
    model = strong_model(visibility="past", options={"num_hidden_layers": 3})
    whole, some = inspect(model)[0], inspect(model, layers=[2, 0])[0]
    assert (some["layers"], some["layer_numbers"]) == (2, [0, 2])
    assert some["shares"]["local"] == [whole["shares"]["local"][i] for i in (0, 2)]
    assert some["slot_similarity"]["global"] == [whole["slot_similarity"]["global"][i] for i in (0, 2)]


def test_kinds_that_are_not_in_use_have_no_similarity():
    found, _ = inspect(strong_model(visibility="past", use_global=False))
    assert found["slot_similarity"]["global"] == [[], []]
    assert found["slot_likeness"]["global"] == [None, None]
    assert np.array(found["slot_similarity"]["local"]).shape == (2, 3, 3)


def test_the_result_is_whole_and_taken_over(tmp_path, caplog):
    model = strong_model(visibility="current")
    target = tmp_path / "inspect.json"
    with caplog.at_level(logging.WARNING):
        plan = inspection_plan(model, stream(), CONTEXT, windows=2, about={"path": "m"}, data={"files": ["f"]})
    assert "summarise its own future" in caplog.text
    measure(plan, target)
    record = read_result(target)
    assert (record["task"], record["protocol"]["name"], record["model"]["path"]) == ("inspect", "inspect", "m")
    assert record["data"]["files"] == ["f"]
    assert record["data"]["tokens"] == 150
    condition = record["conditions"][0]
    assert {key: condition[key] for key in ("attention", "visibility", "causal", "segments", "segment_size")} == {
        "attention": "hici", "visibility": "current", "causal": False, "segments": 4, "segment_size": SEGMENT,
    }  # fmt: skip
    assert measure(plan, target) == json.loads(target.read_text())
    other = inspection_plan(model, stream(), CONTEXT, layers=[1])
    with pytest.raises(ValueError, match="of another measurement"):
        measure(other, target)


def test_the_model_is_left_as_it_was():
    """And it is measured without dropout."""
    model = strong_model(visibility="past", options={"attention_dropout": 0.5})
    plan = inspection_plan(model, stream(), CONTEXT)
    expected = plan.measure_part(plan.parts[0])
    assert not model.training
    model.train()
    assert plan.measure_part(plan.parts[0]) == expected
    assert model.training


def test_below_peft_and_golden_weights():
    model = golden_model("llama_gqa")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 64)
    plain, _ = inspect(model, tokens, 40)
    assert (plain["segments"], plain["segment_size"]) == (4, 10)
    wrapped, _ = inspect(hici.add_lora(model, r=2), tokens, 40)
    for kind in KINDS:
        close(wrapped["shares"][kind], plain["shares"][kind], 1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention": "full"}, "attention 'full' has no slots to look at"),
        ({"attention": "hici_s2"}, "attention 'hici_s2' has no slots"),
        ({"use_global": False, "use_local": False}, "leave tokens alone.*drop --no-slots"),
        ({"context": SEGMENT}, "context 8 is one segment of 8 tokens.*give a context of more than 8"),
        ({"context": 151}, "the data has 150 tokens, fewer than one window of 151"),
        ({"context": 129}, "129 tokens are more than the 128 positions"),
        ({"layers": [5]}, r"layer 5 is not in 0\.\.1"),
        ({"windows": 0}, "max_windows=0 is below 1"),
    ],
    ids=str,
)
def test_what_cannot_be_inspected_is_refused(change, message):
    options = {"max_position_embeddings": 200} if change.get("context") == 151 else {}
    model = strong_model(visibility="past", options=options)
    change = {"context": CONTEXT, **change}
    if "attention" in change:
        set_attention(model, change.pop("attention"))
    slots = {key: change.pop(key) for key in ("use_global", "use_local") if key in change}
    if slots:
        reconfigure(model, **slots)
    with pytest.raises(ValueError, match=message):
        inspection_plan(model, stream(), **change)


def test_a_model_without_hici_and_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="HiCI is not attached"):
        inspection_plan(tiny_model(), stream(), CONTEXT)
    model = strong_model(visibility="past")
    foreign = stream()
    foreign[5] = VOCAB
    with pytest.raises(ValueError, match=f"token {VOCAB}, but the model's vocabulary has {VOCAB} entries"):
        inspection_plan(model, foreign, CONTEXT)
    with torch.no_grad():
        attention_modules(model)[1].q_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="attention weights of layer 1 are not finite"):
        inspect(model)


def test_beyond_the_rope_when_permitted():
    assert inspect(strong_model(visibility="past"), context=136, allow_beyond_rope=True)[0]["segments"] == 17
