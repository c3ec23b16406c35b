"""The published inference: HiCI prefill over fixed segments or one, then decoding over raw keys."""

import pytest
import torch
from transformers import DynamicCache

from golden_checkpoint import MODES, TOLERANCE
from helpers import golden_json, golden_model, golden_tensors, logits
from hici.models.attach import reconfigure

FAMILY = "llama_gqa_infer"
TENSORS = golden_tensors(f"{FAMILY}.cases")
# design: a fully padded segment never enters G; one segment still has slots
DELIBERATE = {"seg16.none.pad29", "seg16.none.short10"}
CASES = golden_json(f"{FAMILY}.cases")["cases"]
COMPARED = [case for case in CASES if case not in DELIBERATE and f"{case}/prefill_logits" in TENSORS]
DECODED = [case for case in COMPARED if f"{case}/decode_tokens" in TENSORS and "pad" not in case]


def _model(case, backend="sdpa"):
    kind, mode, *_ = case.split(".")
    model = golden_model(FAMILY)
    visibility, use_global, use_local = MODES[mode]
    segments = {"fullhici": {"num_segments": 1}, "seg16": {"segment_size": 16}, "ratio": {"segment_size": 13}}[kind]
    reconfigure(model, visibility=visibility, use_global=use_global, use_local=use_local, backend=backend, **segments)
    return model


def _inputs(case):
    return TENSORS[CASES[case]["input_ids"]], TENSORS["mask53_29"] if CASES[case]["mask"] else None


def _gap(out, case, mask):
    gap = (out - TENSORS[f"{case}/prefill_logits"]).abs()
    return gap if mask is None else gap[mask.bool()]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("case", COMPARED)
def test_prefill(case, backend):
    ids, mask = _inputs(case)
    assert _gap(logits(_model(case, backend), ids, mask), case, mask).max() < TOLERANCE


@pytest.mark.parametrize("case", DECODED)
def test_decode_over_raw_keys(case):
    ids, _ = _inputs(case)
    model, cache = _model(case), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for step, tokens in enumerate(TENSORS[f"{case}/decode_tokens"].T):
            out = model(tokens[:, None], past_key_values=cache).logits[:, -1]
            assert (out - TENSORS[f"{case}/decode_logits"][:, step]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", DECODED)
def test_generate_decodes_as_published(case):
    """Greedy generation with decode="raw" picks the published tokens by itself."""
    ids, _ = _inputs(case)
    model = _model(case)
    reconfigure(model, decode="raw")
    tokens = TENSORS[f"{case}/decode_tokens"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens.shape[1] + 1, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
    assert isinstance(out.past_key_values, DynamicCache)
    assert torch.equal(out.sequences[:, ids.shape[1] : -1], tokens)
    steps = torch.stack(out.logits[1:], dim=1)
    assert (steps - TENSORS[f"{case}/decode_logits"]).abs().max() < TOLERANCE


def test_a_block_of_tokens_in_one_call():
    model, cache = _model("fullhici.none"), DynamicCache()
    with torch.no_grad():
        model(_inputs("fullhici.none")[0], past_key_values=cache)
        out = model(TENSORS["block5_tokens"], past_key_values=cache).logits
    assert (out - TENSORS["fullhici.none.block5/logits"]).abs().max() < TOLERANCE


def test_raw_keys_are_the_published_ones():
    case, cache = "seg16.none", DynamicCache()
    with torch.no_grad():
        _model(case)(_inputs(case)[0], past_key_values=cache)
    for i in range(2):
        assert (cache.layers[i].keys - TENSORS[f"{case}/layer{i}.cache_k"]).abs().max() < TOLERANCE
        assert (cache.layers[i].values - TENSORS[f"{case}/layer{i}.cache_v"]).abs().max() < TOLERANCE


def test_a_padded_segment_enters_nothing_here():
    ids, mask = _inputs("seg16.none.pad29")
    gap = (logits(_model("seg16.none.pad29"), ids, mask) - TENSORS["seg16.none.pad29/prefill_logits"]).abs()
    assert gap[0].max() < TOLERANCE  # the row without a padded segment
    assert gap[1, :29].max() > 0.1


def test_one_short_segment_keeps_its_slots_here():
    ids, _ = _inputs("seg16.none.short10")
    out = logits(_model("seg16.none.short10"), ids)
    assert (out - TENSORS["seg16.none.short10/prefill_logits"]).abs().max() > 0.1
    assert (out - TENSORS["fullhici.none.short10/prefill_logits"]).abs().max() < TOLERANCE
