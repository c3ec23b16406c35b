"""`hici eval longbench`: prompts, cutting, both attentions, going on after a kill, bad input."""

from __future__ import annotations

import copy
import json

import pytest
from tokenizers.processors import TemplateProcessing

from helpers import tiny_model
from hici.eval.longbench import predict
from hici.eval.longbench.datasets import get_dataset
from hici.eval.longbench.predict import choose_samples, prediction_plan
from hici.eval.longbench.prompts import cut_middle, fill_in, make_prompt
from hici.eval.longbench.samples import evenly_spaced, find_data, read_samples
from hici.eval.measure import measure
from hici.models.generate import encode_prompt, generate
from hici.models.session import Session
from random_sentences import sentences

SAMPLE = {
    "input": "who sings? {context}", "context": "the cat {input} sings", "answers": ["the cat"], "length": 5,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "a1",
}  # fmt: skip


def sample(index, name="hotpotqa", **changes):
    context = sentences(8, seed=index)
    return SAMPLE | {"context": context, "dataset": name, "_id": f"{name}-{index}", "length": 3000 * index} | changes


def write_data(directory, **counts):
    """A data folder: {dataset: number of samples}."""
    directory.mkdir(exist_ok=True)
    for name, count in counts.items():
        classes = ["river", "old house"] if name == "trec" else None
        answers = ["river"] if name == "trec" else ["cat", "dog river"]
        lines = [sample(i, name, all_classes=classes, answers=answers) for i in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def without_times(record):
    """What must be the same after a kill."""
    record = json.loads(json.dumps(record))
    del record["provenance"]
    for condition in record["conditions"]:
        for holder in (condition, *condition["predictions"]):
            assert holder.pop("seconds") > 0
    return record


# ---- prompts


def test_a_prompt_is_filled_in_once():
    """Braces in the text are text."""
    assert fill_in(get_dataset("repobench-p"), SAMPLE) == (
        "Please complete the code given below. \nthe cat {input} singswho sings? {context}Next line of code:\n"
    )
    assert fill_in(get_dataset("triviaqa"), SAMPLE).endswith(
        "The following are some examples.\n\nthe cat {input} sings\n\nwho sings? {context}"
    )
    assert "who sings" not in fill_in(get_dataset("lcc"), SAMPLE)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """The tokenizer with a first token in front of every text."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", changed.eos_token_id)]
    )
    assert changed("cat")["input_ids"][0] == changed.eos_token_id
    return changed


@pytest.mark.parametrize("max_length", [20, 21, 50])
def test_cutting_in_the_middle(bos_tokenizer, max_length):
    """Equal to the two halves taken from the text's tokens directly."""
    core = bos_tokenizer.backend_tokenizer
    text = fill_in(get_dataset("hotpotqa"), sample(1))
    plain = core.encode(text, add_special_tokens=False).ids  # without the first token, which counts
    half = max_length // 2
    expected = core.decode(plain[: half - 1]) + core.decode(plain[len(plain) - half :])
    assert cut_middle(bos_tokenizer, text, max_length) == expected
    prompt = make_prompt(bos_tokenizer, get_dataset("hotpotqa"), sample(1), max_length)
    assert prompt.ids == [bos_tokenizer.eos_token_id, *core.encode(expected, add_special_tokens=False).ids]
    assert (prompt.whole_tokens, prompt.kept_tokens) == (len(plain) + 1, max_length)


def test_a_prompt_that_fits_is_whole(bos_tokenizer):
    text = fill_in(get_dataset("hotpotqa"), sample(1))
    ids = bos_tokenizer(text)["input_ids"]
    prompt = make_prompt(bos_tokenizer, get_dataset("hotpotqa"), sample(1), len(ids), room=len(ids))
    assert (prompt.ids, prompt.whole_tokens, prompt.kept_tokens) == (ids, len(ids), None)
    assert make_prompt(bos_tokenizer, get_dataset("hotpotqa"), sample(1), len(ids) - 1).kept_tokens == len(ids) - 1


def test_where_the_template_leaves_no_room_more_is_cut(tokenizer):
    dataset = get_dataset("hotpotqa")
    free = make_prompt(tokenizer, dataset, sample(1), 60, chat=True)
    assert len(free.ids) > 60
    assert free.kept_tokens == 60
    prompt = make_prompt(tokenizer, dataset, sample(1), 60, room=60, chat=True)
    assert len(prompt.ids) <= 60
    assert prompt.kept_tokens < 60
    text = cut_middle(tokenizer, fill_in(dataset, sample(1)), prompt.kept_tokens)
    assert prompt.ids == encode_prompt(tokenizer, text, chat=True)
    with pytest.raises(ValueError, match="leave room for 10 tokens of prompt, fewer than the chat template"):
        make_prompt(tokenizer, dataset, sample(1), 60, room=10, chat=True)
    with pytest.raises(ValueError, match="max_length=1 is below 2"):
        make_prompt(tokenizer, dataset, sample(1), 1)


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"])
def test_no_chat_template_for_few_shot_and_code(tokenizer, name):
    dataset = get_dataset(name)
    chat, plain = (make_prompt(tokenizer, dataset, SAMPLE, 5000, chat=chat) for chat in (True, False))
    assert chat == plain
    other = get_dataset("hotpotqa")
    assert make_prompt(tokenizer, other, SAMPLE, 5000, chat=True).ids == encode_prompt(
        tokenizer, fill_in(other, SAMPLE), chat=True
    )


# ---- generation


@pytest.fixture(scope="module")
def model(tokenizer):
    """Plain, with room for the generation lengths of all datasets."""
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=640, eos_token_id=tokenizer.eos_token_id)


def test_stop_tokens(model, tokenizer):
    def new_tokens(**settings):
        return generate(Session(model), tokenizer, ids, max_new_tokens=12, **settings).tokens

    ids = encode_prompt(tokenizer, "the cat sings")
    free = new_tokens()
    stop = next(token for token in free if token != free[0])
    assert new_tokens(stop_tokens=[stop]) == free[: free.index(stop) + 1]
    assert new_tokens(stop_tokens=[free[0]]) == free[:1]
    assert new_tokens(stop_tokens=[free[0]], min_new_tokens=1)[0] != free[0]


def test_samsum_ends_at_a_newline(model, tokenizer, tmp_path, monkeypatch):
    """Only there; all are greedy and of LongBench's generation length, in a session of their own."""
    pytest.importorskip("rouge", reason="samsum's scores need it")
    calls = []

    def spy(session, tokenizer, ids, **settings):
        calls.append((session, len(ids), settings))
        return generate(session, tokenizer, ids, **settings | {"max_new_tokens": 2})

    monkeypatch.setattr(predict, "generate", spy)
    chosen = choose_samples(find_data([write_data(tmp_path / "data", hotpotqa=1, samsum=1)]))
    measure(prediction_plan(model, tokenizer, {}, chosen, max_length=90))
    newline = tokenizer.encode("\n")[-1]
    (one, length, hotpotqa), (two, _, samsum) = calls
    assert hotpotqa == {"max_new_tokens": 32, "stop_tokens": [], "min_new_tokens": 0}
    assert samsum == {"max_new_tokens": 128, "stop_tokens": [newline], "min_new_tokens": 1}
    assert one is not two
    assert abs(length - 90) < 5
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens: [])  # one that leaves newlines out
    measure(prediction_plan(model, tokenizer, {}, chosen, max_length=90))
    assert calls[-1][2]["stop_tokens"] == []


def test_default_length_is_what_the_positions_leave(model, tokenizer, tmp_path):
    pytest.importorskip("rouge", reason="samsum's scores need it")
    chosen = choose_samples(find_data([write_data(tmp_path / "data", hotpotqa=1, samsum=1)]))
    datasets = prediction_plan(model, tokenizer, {}, chosen).protocol["datasets"]
    assert [each["max_length"] for each in datasets.values()] == [640 - 32, 640 - 128]
    prediction_plan(model, tokenizer, {}, chosen, max_length=512)
    prediction_plan(model, tokenizer, {}, chosen, max_length=513, allow_beyond_rope=True)
    with pytest.raises(ValueError, match="641 tokens are more than the 640 positions"):
        prediction_plan(model, tokenizer, {}, chosen, max_length=513)
    with pytest.raises(ValueError, match="hici_s2 is for training"):
        prediction_plan(model, tokenizer, {}, chosen, attentions=["hici_s2"])


# ---- the verb


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("longbench") / "data", hotpotqa=3, trec=2)


def test_both_attentions(hici_command, adapter_directory, data, tmp_path):
    """The written predictions give the result's scores with `hici score longbench`."""
    out = tmp_path / "out"
    command = ("eval", "longbench", adapter_directory, "--data", data, "--attention", "full", "hici", "--out", out,
               "--max-length", 48)  # fmt: skip
    done = hici_command(*command)
    assert done.status == 0, done.err
    for text in ("hotpotqa", "trec", "hici, past", "full", "hotpotqa (3 of 200), trec (2 of 200)"):
        assert text in done.out
    record = json.loads((out / "longbench.json").read_text())
    assert record["task"] == "longbench"
    assert [(c["attention"], c["dataset"], c["samples"], c["max_length"], c["cut"]) for c in record["conditions"]] == [
        ("full", "hotpotqa", 3, 48, 3), ("full", "trec", 2, 48, 2),
        ("hici", "hotpotqa", 3, 48, 3), ("hici", "trec", 2, 48, 2),
    ]  # fmt: skip
    by_attention = {(c["attention"], c["dataset"]): c for c in record["conditions"]}
    texts = [[p["pred"] for p in by_attention[mode, "hotpotqa"]["predictions"]] for mode in ("full", "hici")]
    assert texts[0] != texts[1]
    assert by_attention["hici", "trec"]["visibility"] == "past"
    for mode, folder in (("full", "full"), ("hici", "hici-past")):
        lines = (out / "predictions" / folder / "hotpotqa.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"pred": p["pred"], "answers": ["cat", "dog river"], "all_classes": None, "length": 3000 * i,
             "_id": f"hotpotqa-{i}"}
            for i, p in enumerate(by_attention[mode, "hotpotqa"]["predictions"])
        ]  # fmt: skip
        scored = hici_command("score", "longbench", out / "predictions" / folder, "--output", tmp_path / f"{mode}.json")
        assert scored.status == 0, scored.err
        result = json.loads((tmp_path / f"{mode}.json").read_text())
        assert result["scores"] == {name: by_attention[mode, name]["score"] for name in ("hotpotqa", "trec")}
        assert result["by_length"] == {name: by_attention[mode, name]["by_length"] for name in ("hotpotqa", "trec")}
    again = hici_command(*command)
    assert again.status == 0, again.err
    assert again.out == done.out
    assert "holds this very measurement already" in again.err


def test_not_causal_stands_beside_the_scores(hici_command, adapter_directory, data, tmp_path):
    done = hici_command("eval", "longbench", adapter_directory, "--data", data, "--datasets", "trec", "--max-samples",
                        1, "--attention", "hici", "--visibility", "all", "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    assert "hici, all (not causal)" in done.out
    assert (tmp_path / "predictions" / "hici-all-not-causal" / "trec.jsonl").is_file()


@pytest.mark.parametrize("flags, below", [([], 0), (["--chat"], 3)])
def test_prompts_cut_for_the_chat_template_are_counted(hici_command, base_directory, data, tmp_path, flags, below):
    """The default length leaves no room for a template; two datasets have none."""
    done = hici_command("eval", "longbench", base_directory, "--data", data, "--out", tmp_path, *flags)
    assert done.status == 0, done.err
    conditions = json.loads((tmp_path / "longbench.json").read_text())["conditions"]
    assert [(c["dataset"], c["cut"]) for c in conditions] == [("hotpotqa", 3), ("trec", 2)]
    assert conditions[0]["cut_below_max_length"] == below
    counted = sum(condition["cut_below_max_length"] for condition in conditions)
    assert (f"{counted} prompts were cut below max_length" in done.out) == (counted > 0)
    assert all(p["prompt_tokens"] <= c["max_length"] for c in conditions for p in c["predictions"])


def test_an_attention_that_cannot_generate_is_refused_before_the_first_prompt(
    hici_command, adapter_directory, data, tmp_path
):
    done = hici_command("eval", "longbench", adapter_directory, "--data", data, "--attention", "full", "hici",
                        "--num-segments", 3, "--out", tmp_path)  # fmt: skip
    assert done.status == 2
    assert "num_segments=3 with a HiCICache" in done.err
    assert not list(tmp_path.iterdir())


def test_a_prediction_is_that_of_a_direct_call(hici_command, base_directory, tokenizer, data, tmp_path):
    """transformers' own greedy generation from the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    done = hici_command("eval", "longbench", base_directory, "--data", data / "trec.jsonl", "--max-samples", 1,
                        "--out", tmp_path / "x.json")  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "x.json").read_text())
    (prediction,) = record["conditions"][0]["predictions"]
    assert prediction["index"] == 1  # the middle of two
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    trec = get_dataset("trec")
    prompt = make_prompt(tokenizer, trec, read_samples(data / "trec.jsonl", "trec")[1], 128 - 64, room=128 - 64)
    ids = torch.tensor([prompt.ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0]
    assert prediction["pred"] == tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
    assert prediction["pred"]
    assert prediction["prompt_tokens"] == ids.shape[1] <= 64
    assert (tmp_path / "x-predictions" / "full" / "trec.jsonl").is_file()


def test_after_a_kill_it_goes_on(hici_command, base_directory, data, tmp_path, monkeypatch):
    calls = []

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)

    command = ("eval", "longbench", base_directory, "--data", data, "--out")
    assert hici_command(*command, tmp_path / "whole").status == 0
    monkeypatch.setattr(predict, "generate", killed)
    assert hici_command(*command, tmp_path / "cut").status == 130
    assert not (tmp_path / "cut" / "longbench.json").exists()
    done = hici_command(*command, tmp_path / "cut")
    assert done.status == 0, done.err
    assert "3 of 5 parts were measured before" in done.err
    assert len(calls) == 4 + 2
    whole, cut = (json.loads((tmp_path / x / "longbench.json").read_text()) for x in ("whole", "cut"))
    assert without_times(whole) == without_times(cut)
    for name in ("hotpotqa", "trec"):
        left, right = (tmp_path / x / "predictions" / "full" / f"{name}.jsonl" for x in ("whole", "cut"))
        assert left.read_bytes() == right.read_bytes()


def test_nothing_is_overwritten_silently(hici_command, base_directory, data, tmp_path):
    command = ("eval", "longbench", base_directory, "--data", data, "--datasets", "trec", "--max-samples", 1, "--out",
               tmp_path)  # fmt: skip
    (tmp_path / "predictions" / "full").mkdir(parents=True)
    other = tmp_path / "predictions" / "full" / "trec.jsonl"
    other.write_text("mine")
    done = hici_command(*command)
    assert done.status == 2
    assert "predictions exists, but" in done.err
    assert other.read_text() == "mine"
    (other.parent / "lcc.jsonl").touch()
    done = hici_command(*command, "--overwrite")
    assert (done.status, "full also holds lcc.jsonl, which are of another result" in done.err) == (0, True)
    assert other.read_text().startswith('{"pred"')
    other.write_text("edited")
    done = hici_command(*command)
    assert done.status == 2
    assert "trec.jsonl exists with other content" in done.err
    assert other.read_text() == "edited"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--datasets", "hotpotq"], "unknown LongBench dataset 'hotpotq'; known: .*Did you mean 'hotpotqa'"),
        (["--datasets", "lcc"], "there is no lcc.jsonl in"),
        (["--datasets", "trec", "trec"], "names one twice"),
        (["--max-length", "100"], "164 tokens are more than the 128 positions"),
        (["--rope", "auto"], "--rope changes nothing.*add --max-length"),
        (["--allow-beyond-rope"], "--allow-beyond-rope changes nothing.*add --max-length"),
        (["--attention", "hici_s2", "--segment-size", "16"], "hici_s2 is for training and perplexity"),
    ],
)
def test_bad_flags(hici_command, base_directory, data, flags, message):
    done = hici_command("eval", "longbench", base_directory, "--data", data, *flags)
    assert done.status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(done.err)


def test_data_folders(tmp_path):
    folder = write_data(tmp_path / "data", lcc=1, trec=1, qasper_e=1)
    assert list(find_data([folder])) == ["trec", "lcc", "qasper_e"]
    assert find_data([folder / "lcc.jsonl"]) == {"lcc": folder / "lcc.jsonl"}
    (folder / "notes.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="unknown LongBench dataset .*'notes'.*choose with --datasets"):
        find_data([folder])
    assert list(find_data([folder], ["qasper_e", "trec"])) == ["trec", "qasper_e"]
    with pytest.raises(ValueError, match="are both of lcc"):
        find_data([folder, write_data(tmp_path / "more", lcc=1)], ["lcc"])
    (tmp_path / "none").mkdir()
    for missing, message in ((tmp_path / "none", "holds no .jsonl"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=message):
            find_data([missing])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2: it is no JSON object"),
        (json.dumps({k: v for k, v in SAMPLE.items() if k != "answers"}), "line 2: it lacks answers; give LongBench's"),
        (json.dumps(SAMPLE | {"context": None}), "line 2: context is 'None', no text"),
        (json.dumps(SAMPLE | {"length": "7"}), "line 2: length is '7', no number of words"),
        (json.dumps(SAMPLE | {"dataset": "trec"}), "line 2: its dataset is 'trec'"),
        (json.dumps(SAMPLE | {"answers": []}), "line 2: answers is no list of texts with at least one"),
    ],
)
def test_bad_samples(tmp_path, line, message):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(f"{json.dumps(SAMPLE)}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_samples(path, "hotpotqa")
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_samples(path, "hotpotqa")


def test_samples_of_the_e_selection_may_name_the_plain_dataset(tmp_path):
    path = tmp_path / "hotpotqa_e.jsonl"
    path.write_text(json.dumps(SAMPLE) + "\n" + json.dumps(SAMPLE | {"dataset": "hotpotqa_e"}))
    assert len(read_samples(path, "hotpotqa_e")) == 2


def test_evenly_spaced_samples():
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(3, 7) == [0, 1, 2]
    assert evenly_spaced(10, 2) == [2, 7]
    assert evenly_spaced(200, 4) == [25, 75, 125, 175]
    with pytest.raises(ValueError, match="max_samples=0 is below 1"):
        choose_samples({}, 0)
