"""Retrieval measured: answers, losses and labels of real (tiny) models, resumed runs, files of cases."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import hici
from helpers import small_config, strong_model, tiny_model
from hici.eval.conditions import attention_label
from hici.eval.measure import measure
from hici.eval.retrieval import answering
from hici.eval.retrieval.run import plan_retrieval
from hici.eval.retrieval.settings import Settings
from hici.eval.retrieval.tasks import retrieval_tasks
from hici.models.generate import Generation, encode_prompt, generate
from hici.models.lookup import attention_mode
from hici.models.modes import set_attention
from hici.models.session import Session
from prompt_tokenizers import KINDS, prompt_tokenizer

ABOUT = {"path": "tiny"}
ALL_TASKS = tuple(retrieval_tasks())


def model_for(tokenizer, positions=4096, **hici_options):
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    if not hici_options:
        return tiny_model(**options)
    return strong_model(options=options, check=False, **hici_options)


def run(model, tokenizer, settings, attentions=("full",), target=None):
    return measure(plan_retrieval(model, tokenizer, ABOUT, settings, attentions), target)


def oracle(answer_of):
    """Context: generation gives `answer_of(prompt)`, the prompt being what the expected answer is known from."""

    def answer(model, tokenizer, prompt, with_answer, score, *, allow_beyond_rope):
        def made(session, tokenizer, ids, *, max_new_tokens):
            assert ids == prompt.ids
            tokens = tokenizer(answer_of(prompt), add_special_tokens=False)["input_ids"][:max_new_tokens]
            return Generation(tokenizer.decode(tokens, skip_special_tokens=True), tokens, len(ids), 0, 0.0, 0.0, False)

        with mock.patch.object(answering, "generate", made):
            return answering.answer_prompt(
                model, tokenizer, prompt, with_answer, score, allow_beyond_rope=allow_beyond_rope
            )

    return mock.patch("hici.eval.retrieval.run.answer_prompt", answer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answerer_has_accuracy_1_and_a_wrong_one_0(kind):
    tokenizer = prompt_tokenizer(kind)
    model = model_for(tokenizer)
    settings = Settings(tasks=ALL_TASKS, lengths=(1100,), depths=(0.0, 1.0), samples=1, options={"values": 2})
    with oracle(lambda prompt: f"{prompt.answer_text}."):
        right = run(model, tokenizer, settings)
    assert {c["task"] for c in right["conditions"]} == set(ALL_TASKS)
    assert [c["accuracy"] for c in right["conditions"]] == [1] * len(right["conditions"])
    assert all(answer["correct"] for c in right["conditions"] for answer in c["answers"])
    with oracle(lambda prompt: prompt.text[:40].replace("the", "a") + " 7 and then 8"):
        wrong = run(model, tokenizer, settings)
    assert [c["accuracy"] for c in wrong["conditions"]] == [0] * len(wrong["conditions"])
    for mine in (right, wrong):
        for c in mine["conditions"]:
            low, high = c["accuracy_interval"]
            assert low <= c["accuracy"] <= high
            assert c["prompt_tokens"][1] + c["answers"][0]["max_new_tokens"] <= 1100


def test_half_of_the_answers_is_half_an_accuracy():
    tokenizer = prompt_tokenizer("bytes")
    settings = Settings(tasks=("needle", "passkey"), lengths=(600,), samples=2, depths=(0.5,), options={"values": 2})
    turn = iter([True, True, True, False])  # needle twice, then passkey twice
    with oracle(lambda prompt: f"I know {prompt.expected[0]}." if next(turn) else "no"):
        needle, passkey = run(model_for(tokenizer), tokenizer, settings)["conditions"]
    assert (needle["task"], needle["depth"], needle["accuracy"], needle["samples"]) == ("needle", None, 0.5, 2)
    assert [answer["score"] for answer in needle["answers"]] == [0.5, 0.5]
    assert not any(answer["correct"] for answer in needle["answers"])
    assert (passkey["depth"], passkey["accuracy"]) == (0.5, 0.5)
    assert [answer["correct"] for answer in passkey["answers"]] == [True, False]
    assert needle["accuracy_interval"] == passkey["accuracy_interval"]


def test_a_model_that_has_learnt_the_answers_gives_them():
    """The whole way with nothing replaced: one model is trained on the very prompts, in both attentions."""
    tokenizer = prompt_tokenizer("bytes_bos")
    model = model_for(tokenizer, visibility="past", segment_size=64)
    settings = Settings(tasks=("passkey",), lengths=(180,), depths=(0.0, 1.0), samples=1)
    before = run(model, tokenizer, settings, ("full", "hici"))
    rows = []
    for c in before["conditions"][:2]:
        for i, answer in enumerate(c["answers"]):
            case_prompt = _prompt_of(settings, tokenizer, c["depth"], i)
            assert case_prompt.sha256 == answer["prompt_sha256"]
            rows.append(case_prompt.text + case_prompt.answer_text + tokenizer.eos_token)
    _memorise(model, tokenizer, rows)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    after = run(model, tokenizer, settings, ("full", "hici"))
    for c, d in zip(before["conditions"], after["conditions"], strict=True):
        assert c["accuracy"] == 0
        assert d["accuracy"] == 1, [answer["answer"] for answer in d["answers"]]
        assert d["answer_loss"] < 0.2 < 2 < c["answer_loss"]
        for answer in d["answers"]:
            assert answer["answer"].strip() == answer["expected"]
            assert answer["answer_tokens"] < answer["max_new_tokens"]  # it ended by itself


def _prompt_of(settings, tokenizer, depth, sample):
    from hici.eval.retrieval.base import REPEATED
    from hici.eval.retrieval.fit import Case, make_prompt

    case = Case(settings.generated[0], {}, settings.lengths[0], depth, sample, settings.seed)
    return make_prompt(case, REPEATED, tokenizer, partial(encode_prompt, tokenizer))


def _memorise(model, tokenizer, rows):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = [torch.tensor(tokenizer(row)["input_ids"]) for row in rows]
    model.train()
    for step in range(50):
        set_attention(model, ("full", "hici")[step % 2])
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(model(ids[None]).logits[0, -9:-1], ids[-8:]) for ids in batch) / len(batch)
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["full", "hici"])
def test_answer_loss_is_that_of_one_pass_and_the_answer_that_of_a_fresh_session(kind, attention):
    tokenizer = prompt_tokenizer(kind)
    model = model_for(tokenizer, visibility="past", segment_size=48)
    settings = Settings(tasks=("passkey", "lines"), lengths=(500,), depths=(0.4,), samples=2)
    record = run(model, tokenizer, settings, (attention,))
    set_attention(model, attention)
    for c, task in zip(record["conditions"], settings.generated, strict=True):
        for i, answer in enumerate(c["answers"]):
            prompt = _prompt_of(
                Settings(tasks=(task.name,), lengths=(500,), depths=(0.4,), samples=2), tokenizer, 0.4, i
            )
            with_answer = encode_prompt(tokenizer, prompt.text + prompt.answer_text)
            common = next(n for n, (x, y) in enumerate(zip([*prompt.ids, -1], with_answer, strict=False)) if x != y)
            ids = torch.tensor([with_answer])
            with torch.no_grad():
                losses = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
            assert answer["answer_loss"] == pytest.approx(losses[common - 1 :].mean().item(), abs=2e-5)
            fresh = generate(Session(model), tokenizer, prompt.ids, max_new_tokens=prompt.max_new_tokens)
            assert answer["answer"] == fresh.text
            assert answer["answer_tokens"] == len(fresh.tokens)


def test_sliding_windows_go_back_to_the_prompt_behind_the_answer_loss():
    tokenizer = prompt_tokenizer("bytes")
    model = tiny_model("gemma3", vocab_size=len(tokenizer), max_position_embeddings=512)  # windows of 64
    settings = Settings(tasks=("passkey",), lengths=(300,), depths=(0.4,), samples=1)
    (answer,) = run(model, tokenizer, settings)["conditions"][0]["answers"]
    prompt = _prompt_of(settings, tokenizer, 0.4, 0)
    with_answer = torch.tensor([encode_prompt(tokenizer, prompt.text + prompt.answer_text)])
    with torch.no_grad():
        losses = F.cross_entropy(model(with_answer).logits[0, :-1], with_answer[0, 1:], reduction="none")
    assert answer["answer_loss"] == pytest.approx(losses[len(prompt.ids) - 1 :].mean().item(), abs=2e-5)
    fresh = generate(Session(model), tokenizer, prompt.ids, max_new_tokens=prompt.max_new_tokens)
    assert answer["answer"] == fresh.text


def test_weights_that_give_no_numbers_are_said():
    tokenizer = prompt_tokenizer("bytes")
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    settings = Settings(tasks=("passkey",), lengths=(300,), depths=(0.4,), samples=1)
    with pytest.raises(ValueError, match="the loss of an answer is nan; a model with sound weights gives finite ones"):
        run(model, tokenizer, settings)


def test_conditions_say_how_the_prompt_was_read():
    tokenizer = prompt_tokenizer("bytes")
    settings = Settings(tasks=("passkey",), lengths=(300, 400), depths=(0.5,), samples=1)
    found = {}
    for visibility in ("past", "all"):
        model = model_for(tokenizer, visibility=visibility, segment_size=64)
        record = run(model, tokenizer, settings, ("full", "hici", "hici_s2"))
        assert [(c["attention"], c["context"]) for c in record["conditions"]] == [
            (attention, length) for attention in ("full", "hici", "hici_s2") for length in (300, 400)
        ]
        found[visibility] = record["conditions"]
    for conditions in found.values():
        full, s2 = conditions[0], conditions[4]
        assert (full["decode"], full["causal"], full["segments"]) == ("all keys", True, None)
        assert full["answer_loss"] > 0
        assert (s2["decode"], s2["causal"], s2["answer_loss"]) == ("raw keys", True, None)
    past, every = (found[visibility][3] for visibility in ("past", "all"))
    assert (past["decode"], past["causal"], past["segment_size"], past["segments"]) == (
        "slots and segment", True, 64, 7,
    )  # fmt: skip
    assert past["answer_loss"] > 0
    assert (every["decode"], every["causal"], every["answer_loss"]) == ("raw keys", False, None)
    assert attention_label(past) == "hici, past"
    assert attention_label(every) == "hici, all (not causal)"
    assert past["answers"][0]["prompt_sha256"] == every["answers"][0]["prompt_sha256"]
    assert past["answers"][0]["answer"] != every["answers"][0]["answer"]


def _numbers(record):
    """What must not depend on the run: all but times, memory and where it ran."""
    kept = {key: value for key, value in record.items() if key != "provenance"}
    apart = ("seconds", "peak_memory_bytes")
    kept["conditions"] = [{k: v for k, v in c.items() if k not in apart} for c in record["conditions"]]
    return kept


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path):
    tokenizer = prompt_tokenizer("bytes")
    model = model_for(tokenizer, visibility="past", segment_size=64)
    settings = Settings(tasks=("passkey", "variables"), lengths=(400,), depths=(0.0, 1.0), samples=2, seed=4)
    whole = run(model, tokenizer, settings, ("full", "hici"), tmp_path / "whole.json")
    asked = []

    def interrupted(*args, **kwargs):
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answering.answer_prompt(*args, **kwargs)

    target = tmp_path / "killed.json"
    with mock.patch("hici.eval.retrieval.run.answer_prompt", interrupted):
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, settings, ("full", "hici"), target)
        assert not target.exists()
        again = run(model, tokenizer, settings, ("full", "hici"), target)
    assert len(asked) == 6 + 12 - 5  # five were kept
    assert _numbers(again) == _numbers(whole) == _numbers(json.loads(target.read_text()))
    other = Settings(tasks=("passkey", "variables"), lengths=(400,), depths=(0.0, 1.0), samples=2, seed=5)
    with pytest.raises(ValueError, match=r"is of another measurement: its seed is 4, now 5"):
        run(model, tokenizer, other, ("full", "hici"), target)


def test_a_prompt_is_the_same_whatever_else_is_measured():
    tokenizer = prompt_tokenizer("sentencepiece")
    model = model_for(tokenizer)
    large = Settings(tasks=("lines", "passkey"), lengths=(300, 400), depths=(0.0, 0.5), samples=2)
    small = Settings(tasks=("passkey",), lengths=(400,), depths=(0.5,), samples=1)
    (one,) = run(model, tokenizer, small)["conditions"]
    (other,) = [c for c in run(model, tokenizer, large)["conditions"]
                if (c["task"], c["context"], c["depth"]) == ("passkey", 400, 0.5)]  # fmt: skip
    assert one["answers"] == other["answers"][:1]


def test_depths_are_told_apart_to_the_last_place_and_0_is_0():
    tokenizer = prompt_tokenizer(KINDS[0])
    close = Settings(tasks=("passkey",), lengths=(400,), depths=(0.12345678, 0.12345679), samples=1)
    entries = run(model_for(tokenizer), tokenizer, close)["conditions"]
    assert len({entry["answers"][0]["seed"] for entry in entries}) == 2
    whole, fractions = (
        plan_retrieval(model_for(tokenizer), tokenizer, ABOUT, Settings(("passkey",), (400,), depths), ["full"])
        for depths in ((0, 1), (0.0, 1.0))
    )
    assert whole.header() == fractions.header()
    assert whole.parts == fractions.parts
    seeds = [plan.measure_part(plan.parts[0])["seed"] for plan in (whole, fractions)]
    assert seeds[0] == seeds[1]


def test_what_the_model_cannot_do_is_said_before_anything_is_measured():
    tokenizer = prompt_tokenizer("bytes")
    model = model_for(tokenizer, positions=512, visibility="past", num_segments=4)
    set_attention(model, "full")
    passkey = partial(Settings, tasks=("passkey",), samples=2)
    with pytest.raises(ValueError, match="600 tokens are more than the 512 positions of the model's rope"):
        plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(300, 600)), ["full"])
    with pytest.raises(ValueError, match=r"length 100 is too short for task passkey: .* give at least 1\d\d") as error:
        plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(300, 100)), ["full"])
    least = int(str(error.value).rpartition(" ")[2])
    assert len(plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(300, least)), ["full"]).parts) == 40
    with pytest.raises(ValueError, match="is too short"):
        plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(least - 2,)), ["full"])
    with pytest.raises(ValueError, match="num_segments=4 with a HiCICache"):
        plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(300,)), ["full", "hici"])
    assert attention_mode(model) == "full"
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(300,), chat=True), ["full"])
    beyond = plan_retrieval(model, tokenizer, ABOUT, passkey(lengths=(600,)), ["full"], allow_beyond_rope=True)
    assert measure(beyond)["conditions"][0]["context"] == 600


def test_a_haystack_too_short_for_the_longest_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "a.txt").write_text("It rained. " * 40)
    tokenizer = prompt_tokenizer("bytes")
    settings = Settings(tasks=("needle",), lengths=(300, 2000), samples=1, haystack=(str(tmp_path / "a.txt"),))
    with pytest.raises(ValueError, match=r"length 2000 for task needle: all there is \(40 units of filler\)"):
        plan_retrieval(model_for(tokenizer), tokenizer, ABOUT, settings, ["full"])
    short = Settings(tasks=("needle",), lengths=(200,), depths=(0.5,), samples=1, haystack=settings.haystack)
    plan = plan_retrieval(model_for(tokenizer), tokenizer, ABOUT, short, ["full"])
    assert plan.data["haystack"]["sentences"] == 40
    assert measure(plan)["conditions"][0]["prompt_tokens"][0] > 150


def _cases(tmp_path):
    lines = tmp_path / "lines.jsonl"
    texts = [f"line a-b: <{number}>\n{'x ' * extra}\nWhat is in line a-b?" for number, extra in ((12, 5), (34, 300))]
    lines.write_text("".join(json.dumps({"prompt": text, "expected_number": number}) + "\n"
                             for text, number in zip(texts, (12, 34), strict=True)))  # fmt: skip
    topics = tmp_path / "topics.jsonl"
    topics.write_text(json.dumps({"prompt": "Topics: the sea, the sky. The first?", "topics": ["The sea", "x"]}) + "\n")
    return lines, topics


def test_cases_from_files(tmp_path):
    lines, topics = _cases(tmp_path)
    tokenizer = prompt_tokenizer("bytes")
    asked = Settings(tasks=("lines", "topics"), cases=(str(lines), str(topics)), case_tasks=("lines", "topics"))
    with oracle(lambda prompt: f"the answer: {prompt.expected[0].lower()}."):
        record = run(model_for(tokenizer), tokenizer, asked)
    of_lines, of_topics = record["conditions"]
    assert (of_lines["task"], of_lines["samples"], of_lines["accuracy"], of_lines["depth"]) == ("lines", 2, 1, None)
    assert [answer["case"] for answer in of_lines["answers"]] == [f"{lines}:1", f"{lines}:2"]
    assert [answer["expected"] for answer in of_lines["answers"]] == ["12", "34"]
    assert of_lines["context"] == max(a["prompt_tokens"] + a["max_new_tokens"] for a in of_lines["answers"])
    assert (of_topics["samples"], of_topics["accuracy"], of_topics["skipped_too_long"]) == (1, 1, 0)
    assert record["seed"] is None
    assert [file["task"] for file in record["data"]["cases"]] == ["lines", "topics"]
    first = Settings(tasks=("lines",), cases=(str(lines),), case_tasks=("lines",), samples=1)
    (only,) = run(model_for(tokenizer), tokenizer, first)["conditions"]
    assert (only["samples"], only["cases_in_file"], only["answers"][0]["expected"]) == (1, 2, "12")


def test_cases_too_long_are_an_error_or_counted(tmp_path, caplog):
    lines, _ = _cases(tmp_path)
    tokenizer = prompt_tokenizer("bytes")
    model = model_for(tokenizer, positions=256)
    ask = partial(Settings, tasks=("lines",), cases=(str(lines),), case_tasks=("lines",))
    with pytest.raises(ValueError, match=r"1 of 2 cases of .*lines.jsonl are too long; the longest, .*lines.jsonl:2, "
                       r"takes \d+ tokens with its answer, and the limit is 256 .* or --skip-too-long"):  # fmt: skip
        plan_retrieval(model, tokenizer, ABOUT, ask(), ["full"])
    (left,) = run(model, tokenizer, ask(skip_too_long=True))["conditions"]
    assert (left["samples"], left["skipped_too_long"], left["cases_in_file"]) == (1, 1, 2)
    assert "1 of 2 cases" in caplog.text
    with pytest.raises(ValueError, match="the limit is 30"):
        plan_retrieval(model, tokenizer, ABOUT, ask(lengths=(30,), skip_too_long=True), ["full"])


def test_a_chat_template_counts_and_begins_the_answer():
    tokenizer = prompt_tokenizer("bytes")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        model = model_for(tokenizer)
        settings = Settings(tasks=("passkey",), lengths=(400,), depths=(0.5,), samples=1, chat=True)
        seen = []
        with oracle(lambda prompt: seen.append(tokenizer.decode(prompt.ids)) or prompt.answer_text):
            (c,) = run(model, tokenizer, settings)["conditions"]
    finally:
        tokenizer.chat_template = None
    assert seen[0].startswith("[user] There is an important info")
    assert seen[0].endswith("The pass key is[assistant]")
    assert c["accuracy"] == 1
    assert c["answer_loss"] > 0
    assert c["prompt_tokens"][0] + c["answers"][0]["max_new_tokens"] <= 400


def test_a_plain_model_in_segments_without_slots():
    tokenizer = prompt_tokenizer("bytes")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    hici.attach(model, small_config(segment_size=64, use_global=False, use_local=False, visibility="past"))
    set_attention(model, "full")
    settings = Settings(tasks=("passkey",), lengths=(300,), depths=(0.5,), samples=1)
    full, segments = run(model, tokenizer, settings, ("full", "hici"))["conditions"]
    assert (segments["visibility"], segments["causal"], segments["decode"]) == (None, True, "slots and segment")
    assert full["answer_loss"] != pytest.approx(segments["answer_loss"], abs=1e-4)
