"""lm-eval's model type "hici" against lm-eval's own `hf` and against logits of the model."""

import copy
import json
import logging

import pytest

pytest.importorskip("lm_eval")

import datasets
import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import hici
from adapter_models import IDS, make_base, make_trained
from hici.eval.harness import HiCIModel
from hici.models.cache import HiCICache
from hici.models.lookup import get_causal_lm
from hici.models.modes import set_attention

PAIRS = [
    ("the old house", " sings"),
    ("the old house", " runs"),
    ("the old house", " runs over the river and then the blue dog sees a tree while the cat sings"),
    ("", "a dog sees the mountain"),
    ("the cat runs quickly under the blue tree and " * 3, "the dog sees a river."),
    ("a river runs slowly over the mountain and then the dog " * 12, "sings"),
]
TEXTS = ["the cat sees the dog and then runs over the old mountain. " * 20, "a blue tree", ""]


def requests_of(kind, arguments):
    return [Instance(kind, {}, each, i, ("a_task", i, 1)) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def adapter(adapter_directory):
    return hici.from_pretrained(adapter_directory)


@pytest.fixture
def harness_model(adapter, tokenizer):
    def make(attention="full", **options):
        return HiCIModel(adapter, attention, tokenizer=tokenizer, **{"progress": False, **options})

    yield make
    hici.reconfigure(adapter, segment_size=16, visibility="past")


@torch.no_grad()
def direct(model, lm, context, continuation):
    """(log-likelihood, greedy) of one text alone, from whole logits in float64."""
    ids = [lm.prefix_token_id, *lm.tok_encode(continuation)]
    length = len(ids) - 1
    if context:
        ids = lm.tok_encode(context + continuation)
        length = len(ids) - len(lm.tok_encode(context.rstrip()))
    ids = torch.tensor(ids[-(lm.max_length + 1) :])
    scores = model(ids[None, :-1]).logits[0, -length:].double().log_softmax(-1)
    return scores.gather(1, ids[-length:, None]).sum().item(), bool((scores.argmax(-1) == ids[-length:]).all())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_lm_evals_own_model_on_a_plain_one(base_directory, batch_size):
    ours = HiCIModel(str(base_directory), batch_size=batch_size, progress=False, device="cpu")
    theirs = HFLM(pretrained=str(base_directory), batch_size=batch_size, device="cpu")
    assert ours.max_length == theirs.max_length == 128
    assert ours.prefix_token_id == theirs.prefix_token_id
    pairs = requests_of("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(score, 3) for score, _ in found}) == len(PAIRS)
    texts = requests_of("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6
    )


def test_greedy_is_told(harness_model, adapter):
    """The likeliest continuation is told to be so, and another one is not."""
    lm = harness_model()
    context = lm.tok_encode("the old house")
    with torch.no_grad():
        likeliest = adapter(torch.tensor([context])).logits[0, -1].argmax().item()
    found = lm._loglikelihood_tokens([(None, context, [likeliest]), (None, context, [likeliest - 1])])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("attention, visibility", [
    ("full", "past"), ("hici", "past"), ("hici", "all"), ("hici", "current"), ("hici_s2", "past"),
])  # fmt: skip
def test_log_likelihoods_are_those_of_each_text_alone(harness_model, adapter, attention, visibility):
    hici.reconfigure(adapter, visibility=visibility)
    expected = [direct(adapter, harness_model(attention), *pair) for pair in PAIRS]
    for batch_size in (1, 4):
        lm = harness_model(attention, batch_size=batch_size)
        found = lm.loglikelihood(requests_of("loglikelihood", PAIRS))
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert lm.truncated == 1  # the longest one


def test_slots_move_log_likelihoods(harness_model, adapter):
    pair = requests_of("loglikelihood", PAIRS[-1:])
    scores = [harness_model(attention).loglikelihood(pair)[0][0] for attention in ("full", "hici", "hici_s2")]
    assert min(abs(scores[0] - scores[1]), abs(scores[1] - scores[2]), abs(scores[0] - scores[2])) > 1e-3


@pytest.mark.parametrize("attention, visibility", [("full", "past"), ("hici", "past"), ("hici", "all")])
def test_generation_is_that_of_each_prompt_alone(harness_model, adapter, tokenizer, attention, visibility):
    hici.reconfigure(adapter, visibility=visibility)
    prompts = ["the cat runs quickly under the blue tree and then the dog", "a river", "the old house sings " * 60]
    settings = {"until": ["\n"], "max_gen_toks": 12}
    lm = harness_model(attention, batch_size=2)
    found = lm.generate_until(requests_of("generate_until", [(prompt, settings) for prompt in prompts]))
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)[-(128 - 12) :]])
        made = get_causal_lm(adapter).generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
    assert len(set(found)) == 3
    assert lm.truncated == int(len(tokenizer.encode(prompts[2])) > 116)
    whole = max(found, key=len)
    stop = whole[len(whole) // 2]
    cut = lm.generate_until(requests_of("generate_until", [(prompts[found.index(whole)],
                                                            {**settings, "until": [stop]})]))  # fmt: skip
    assert cut == [whole.split(stop)[0]]


def test_prompts_that_are_cut_are_counted(harness_model, tokenizer, caplog):
    lm = harness_model(batch_size=3, max_length=40)
    prompts = ["the old house sings " * 20, "a river", "the old house sings " * 19]
    with caplog.at_level(logging.WARNING, logger="hici"):
        lm.generate_until(requests_of("generate_until", [(prompt, {"max_gen_toks": 4}) for prompt in prompts]))
    assert lm.truncated == 2
    assert [r.message for r in caplog.records] == [
        "requests longer than max_length=40 lose their beginning; the result counts them"
    ]


def test_too_many_new_tokens(harness_model):
    with pytest.raises(ValueError, match="a_task asks for 128 new tokens, but the model reads 128 .* larger max_leng"):
        harness_model().generate_until(requests_of("generate_until", [("a", {"max_gen_toks": 128})]))


def test_requests_that_cannot_be_scored(harness_model):
    lm = harness_model(max_length=16)
    with pytest.raises(ValueError, match="1 tokens of context and 0 to score; both need one at least"):
        lm._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(ValueError, match="continuation has 17 tokens, but the model reads 16; give a larger max_"):
        lm._loglikelihood_tokens([(None, [1], [2] * 17)])


@pytest.mark.parametrize("pair, message", [
    (("", ""), "a_task scores '' behind an empty text, which are no tokens"),
    (("a", ""), "1 tokens of context and 0 to score"),
    ((" ", "x"), "0 tokens of context and 2 to score"),
])  # fmt: skip
def test_empty_texts_that_cannot_be_scored(harness_model, pair, message):
    with pytest.raises(ValueError, match=message):
        harness_model().loglikelihood(requests_of("loglikelihood", [PAIRS[0], pair]))


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_an_empty_prompt(harness_model, attention):
    prompts = [("the dog", {"max_gen_toks": 2}), ("", {"max_gen_toks": 2})]
    with pytest.raises(ValueError, match="the prompt '' has no tokens, so nothing can follow it"):
        harness_model(attention, batch_size=2).generate_until(requests_of("generate_until", prompts))


def test_segments_that_depend_on_the_batch(harness_model, adapter, tokenizer, adapter_directory):
    hici.reconfigure(adapter, num_segments=2)
    message = r"batch_size=4 with num_segments=2: .* texts beside it; give segment_size \(--segment-size\), or batch_s"
    for attention in ("hici", "hici_s2"):
        with pytest.raises(ValueError, match=message):
            harness_model(attention, batch_size=4)
        assert harness_model(attention, batch_size=1).batch_size == 1
    assert harness_model("full", batch_size=4).batch_size == 4
    with pytest.raises(ValueError, match=message):
        HiCIModel(str(adapter_directory), "hici", num_segments=2, batch_size="4")


@pytest.mark.parametrize("visibility, label, warned", [
    ("past", "hici, past", False), ("current", "hici, current (not causal)", True),
    ("all", "hici, all (not causal)", True),
])  # fmt: skip
def test_not_causal_is_marked(harness_model, adapter, caplog, visibility, label, warned):
    hici.reconfigure(adapter, visibility=visibility)
    with caplog.at_level(logging.WARNING, logger="hici"):
        lm = harness_model("hici")
    assert ("no log-likelihood is one of a language model" in caplog.text) == warned
    info = lm.get_model_info()["hici"]
    assert (info["label"], info["causal"], info["visibility"]) == (label, not warned, visibility)


@pytest.mark.parametrize("options, message", [
    ({"batch_size": "auto"}, "batch_size='auto'; give a number"),
    ({"batch_size": 0}, "batch_size=0; give a number"),
    ({"segment_sise": 3}, "unknown argument of lm-eval's model 'hici' 'segment_sise'.* Did you mean 'segment_size'"),
    ({"segment_size": 16}, "segment_size=16 changes nothing in attention full; give attention=hici"),
    ({"slots": False}, "slots=False changes nothing in attention full; give attention=hici"),
    ({"attention": "hici", "slots": False, "visibility": "all"}, "visibility=all, but there is no slot to see"),
    ({"attention": "hici_s2", "visibility": "past"}, "visibility=past, but there is no slot to see"),
    ({"attention": "hci"}, "unknown attention 'hci'.*Did you mean 'hici'"),
    ({"attention": "hici"}, "a plain model: its slots would be fresh random ones"),
    ({"dtype": "int8"}, "dtype='int8' is no floating-point dtype"),
    ({"max_length": 129}, "129 tokens are more than the 128 positions"),
])  # fmt: skip
def test_refusals_by_name(base_directory, options, message):
    with pytest.raises(ValueError, match=message):
        HiCIModel(str(base_directory), **options)


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "cpu", None])
def test_a_machine_without_cuda(base_directory, device, monkeypatch, caplog):
    """lm-eval's command gives device="cuda:0" everywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="hici"):
        assert HiCIModel(str(base_directory), device=device).device.type == "cpu"
    assert ("torch has no CUDA device here; going on with the CPU" in caplog.text) == str(device).startswith("cuda")


def test_refusals_of_a_loaded_model(adapter, tokenizer, adapter_directory, monkeypatch):
    with pytest.raises(ValueError, match="a loaded model without its tokenizer; give tokenizer="):
        HiCIModel(adapter)
    with pytest.raises(ValueError, match="segment_size=8 is for a model that is given by its name, but this one"):
        HiCIModel(adapter, tokenizer=tokenizer, segment_size=8)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        HiCIModel(adapter, tokenizer=without)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, and in each of them lm-eval would measure everything"):
        HiCIModel(str(adapter_directory))


def test_the_callers_tokenizer_stays_as_it_is(adapter, tokenizer):
    assert tokenizer.pad_token_id is None
    assert HiCIModel(adapter, tokenizer=tokenizer).tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_beyond_the_rope_where_it_is_permitted(harness_model, adapter, tokenizer, attention):
    lm = harness_model(attention, max_length=200, allow_beyond_rope=True)
    assert lm.max_length == 200
    prompt = "the old house sings " * 60
    (found,) = lm.generate_until(requests_of("generate_until", [(prompt, {"until": ["\n"], "max_gen_toks": 9})]))
    ids = tokenizer.encode(prompt)[-(200 - 9) :]
    assert len(ids) > 128
    cache = HiCICache(adapter, allow_beyond_rope=True) if attention == "hici" else None
    made = get_causal_lm(adapter).generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0,
                                           past_key_values=cache)  # fmt: skip
    assert found == tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).split("\n")[0]


def test_lm_evals_python_interface(adapter_directory, adapter, tmp_path, monkeypatch):
    """By name through simple_evaluate, on a local task, in a mode that is in no file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:2]))
    (tmp_path / "task.yaml").write_text(
        "task: my_texts\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {tmp_path}/texts.jsonl\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    found = lm_eval.simple_evaluate(
        model="hici",
        model_args=f"pretrained={adapter_directory},attention=hici,segment_size=8,visibility=past,dtype=float32,"
        "progress=false",
        tasks=["my_texts"],
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        batch_size=2,
        device="cpu",
    )
    hici.reconfigure(adapter, segment_size=8)
    lm = HiCIModel(adapter, "hici", tokenizer=get_model("hici")(str(adapter_directory)).tokenizer, progress=False)
    nats = -sum(lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,) for text in TEXTS[:2]])))
    hici.reconfigure(adapter, segment_size=16)
    size = sum(len(text.encode()) for text in TEXTS[:2])
    assert found["results"]["my_texts"]["bits_per_byte,none"] == pytest.approx(nats / size / 0.6931471805599453)
    about = found["config"]["hici"]
    assert (about["label"], about["segment_size"]) == ("hici, past", 8)
    json.dumps(found["config"])  # lm-eval writes it


def test_registered():
    assert get_model("hici") is HiCIModel


def test_weights_that_peft_keeps_in_two_places(tokenizer, tmp_path):
    """Tied embeddings with a trained copy: lm-eval's own model would tie them anew, and fails on them."""
    model = make_trained(make_base(tmp_path, tie=True), tie=True)
    set_attention(model, "hici")
    with torch.no_grad():
        scores = model(IDS[:1]).logits[0].double().log_softmax(-1)
    lm = HiCIModel(model, tokenizer=tokenizer, progress=False)
    ids = IDS[0].tolist()
    ((found, _),) = lm._loglikelihood_tokens([(None, ids[:30], ids[30:])])
    expected = scores[29:-1].gather(1, IDS[0, 30:, None]).sum().item()
    assert found == pytest.approx(expected, abs=1e-4)
