"""The oracle of the strict protocol against a direct computation in float64, document by document."""

import argparse
import inspect
import math
import statistics
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from harness_oracle import harness_model, harness_rolling_loss
from helpers import tiny_model
from hici.data.stream import Document
from hici.eval.measure import measure
from hici.eval.protocols import make_text, perplexity_plan

WORDS = [f"w{i}" for i in range(60)]
PREFIX, EOS = 60, 61


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=64, max_position_embeddings=64)


def make_tokenizer(bos=True, adds_bos=False):
    core = Tokenizer(models.WordLevel({**{w: i for i, w in enumerate(WORDS)}, "<bos>": PREFIX, "<eos>": EOS}, "w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", PREFIX)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="w0", **({"bos_token": "<bos>"} if bos else {})
    )


def document(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(60, (tokens,), generator=generator).tolist())


@torch.no_grad()
def direct_loss(model, prefix, ids, context, stride):
    """Every token once: the first `context` from the beginning, then `stride` by `stride` with all the context there is
    room for."""
    read, total = [prefix, *ids], 0.0
    done, end = 0, min(context, len(ids))
    while done < len(ids):
        begin = max(0, end - context)
        scores = model(torch.tensor([read[begin:end]])).logits[0].double().log_softmax(-1)
        total += sum(scores[t - begin, ids[t]].item() for t in range(done, end))
        done, end = end, min(end + stride, len(ids))
    return total


@pytest.mark.parametrize("tokens", [(1,), (16,), (17,), (40, 9)])
@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_windows(model, tokens, stride):
    tokenizer = make_tokenizer()
    documents = [document(count, seed) for seed, count in enumerate(tokens)]
    found, counted = harness_rolling_loss(model, tokenizer, documents, 16, stride)
    expected = [
        direct_loss(model, PREFIX, tokenizer.encode(text), 16, 16 if stride is None else stride) for text in documents
    ]
    assert (found, counted) == (pytest.approx(sum(expected), abs=1e-4), sum(tokens))


@pytest.mark.parametrize("bos, adds_bos, prefix, first", [
    (True, False, PREFIX, []), (False, False, EOS, []), (True, True, PREFIX, [PREFIX]),
])  # fmt: skip
def test_prefix_token(model, bos, adds_bos, prefix, first):
    """BOS where the tokenizer has one, else EOS; a BOS that the tokenizer adds stands behind it, and is scored."""
    tokenizer = make_tokenizer(bos, adds_bos)
    text = document(20, seed=5)
    ids = [*first, *(WORDS.index(word) for word in text.split())]
    assert harness_model(model, tokenizer, 16).prefix_token_id == prefix
    found, counted = harness_rolling_loss(model, tokenizer, [text], 16)
    assert (found, counted) == (pytest.approx(direct_loss(model, prefix, ids, 16, 16), abs=1e-4), len(ids))


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("bos", [True, False])
def test_strict_perplexity_is_the_harness_s(model, bos, stride):
    """From the texts on, each in its own way."""
    tokenizer = make_tokenizer(bos)
    texts = [document(count, seed) for seed, count in enumerate((40, 9, 17))]
    score, counted = harness_rolling_loss(model, tokenizer, texts, 16, stride)
    documents = [Document(np.array(tokenizer.encode(text, add_special_tokens=False)), True) for text in texts]
    text = make_text(documents, "strict", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    (condition,) = measure(perplexity_plan(model, text, "strict", [16], ["full"], stride=stride, about={}))[
        "conditions"
    ]
    assert condition["tokens_scored"] == counted == 66
    assert condition["mean_loss"] == pytest.approx(-score / counted, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("context", [512, 2048])
def test_strict_perplexity_of_smollm2_is_the_harness_s(context):
    """Real weights and real text; after `make demo`, which fetches them."""
    place = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
    if not place.is_dir():
        pytest.skip(f"no {place}; `make demo` puts it there")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    texts = [inspect.getsource(module)[:16_000] for module in (argparse, statistics)]
    score, counted = harness_rolling_loss(model, tokenizer, texts, context)
    documents = [Document(np.array(tokenizer.encode(text, add_special_tokens=False)), True) for text in texts]
    text = make_text(documents, "strict", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    (condition,) = measure(perplexity_plan(model, text, "strict", [context], ["full"], about={}))["conditions"]
    assert condition["tokens_scored"] == counted > 3 * context
    assert condition["mean_loss"] == pytest.approx(-score / counted, abs=1e-5)
    assert condition["ppl"] == pytest.approx(math.exp(-score / counted), rel=1e-4)
