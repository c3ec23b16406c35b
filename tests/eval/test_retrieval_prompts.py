"""Retrieval prompts: exact lengths and depths in any tokenizer, and the same from one seed everywhere."""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hici.eval.retrieval.base import REPEATED, Filler, hide, place
from hici.eval.retrieval.draws import Draws, seed_of
from hici.eval.retrieval.fit import Case, answer_room, make_prompt, shortest
from hici.eval.retrieval.tasks import get_task, retrieval_tasks
from hici.models.generate import encode_prompt
from prompt_tokenizers import KINDS, prompt_tokenizer

TASKS = retrieval_tasks()
STORY = Filler(tuple(f"On day {i} it rained {'again and ' * (i % 5)}again." for i in range(4000)), repeats=False)


def defaults(name):
    return {option: value.default for option, value in TASKS[name].options.items()}


def case(name, length=2000, depth=0.5, sample=0, seed=0, **options):
    options = defaults(name) | options
    return Case(TASKS[name], options, length, depth if TASKS[name].has_depth(options) else None, sample, seed)


def build(asked, kind="bytes", filler=REPEATED):
    tokenizer = prompt_tokenizer(kind)
    return make_prompt(asked, filler, tokenizer, partial(encode_prompt, tokenizer))


@given(
    name=st.sampled_from(sorted(TASKS)),
    kind=st.sampled_from(KINDS),
    extra=st.integers(0, 2500),
    depth=st.floats(0, 1),
    sample=st.integers(0, 5),
    filler=st.sampled_from([REPEATED, STORY]),
)
def test_prompt_and_answer_fill_the_length_to_within_one_unit(name, kind, extra, depth, sample, filler):
    tokenizer = prompt_tokenizer(kind)
    encode = partial(encode_prompt, tokenizer)
    # the shortest length depends a little on the numbers that are drawn, which depend on the length
    length = max(shortest(case(name, 300 + extra, depth, sample), filler, tokenizer, encode), 300) + extra
    asked = case(name, length, depth, sample)
    assume(shortest(asked, filler, tokenizer, encode) <= length)
    prompt = build(asked, kind, filler)
    draft = asked.draft(filler)
    assert prompt.ids == list(tokenizer(prompt.text)["input_ids"])
    assert prompt.text == draft.text(prompt.units)
    assert len(prompt.ids) + prompt.max_new_tokens <= length
    assert len(encode(draft.text(prompt.units + 1))) + prompt.max_new_tokens > length
    assert (prompt.ids[0] == tokenizer.bos_token_id) == (kind not in ("bytes", "letters"))
    # whatever the model puts in front of it, the right answer has room
    spoken = f"{draft.lead_in} {', '.join(prompt.expected)}."
    assert len(tokenizer(spoken)["input_ids"]) < prompt.max_new_tokens
    assert TASKS[name].score(spoken, prompt.expected) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_least_length_is_named_and_works(name, kind):
    tokenizer = prompt_tokenizer(kind)
    encode = partial(encode_prompt, tokenizer)
    near = shortest(case(name, 80), REPEATED, tokenizer, encode)
    grid = [case(name, length, sample=i) for length in range(near - 8, near + 9) for i in range(15)]
    exact = [asked for asked in grid if shortest(asked, REPEATED, tokenizer, encode) == asked.length]
    assert exact
    prompt = build(exact[0], kind)
    assert prompt.units == 0
    assert len(prompt.ids) + prompt.max_new_tokens == exact[0].length
    with pytest.raises(ValueError, match=rf"length 80 is too short for task {name}: .* take (\d+) tokens") as error:
        build(case(name, 80), kind)
    least = int(re.search(r"give at least (\d+)", str(error.value))[1])
    assert least == shortest(case(name, 80), REPEATED, tokenizer, encode)


@given(depth=st.floats(0, 1), length=st.integers(400, 3000), kind=st.sampled_from(KINDS))
def test_the_depth_is_that_share_of_the_filler(depth, length, kind):
    tokenizer = prompt_tokenizer(kind)
    for name, hidden, filler, most in (
        ("passkey", "The pass key is", REPEATED, 24),
        ("needle", "A secret number", STORY, 60),
    ):
        asked = case(name, length, depth, **({"keys": 1} if name == "needle" else {}))
        prompt = build(asked, kind, filler)
        lines = prompt.text.split("\n")
        body = " ".join(lines[1:-1])
        before, _, behind = body.partition(hidden)
        rest = behind.partition("is the pass key." if name == "passkey" else ". ")[2]
        share = len(before) / (len(before) + len(rest))
        assert abs(share - depth) * (len(before) + len(rest)) <= most, (name, share)
        if name == "passkey":  # of even text, the share of the tokens is that of the letters
            in_front, all_of_it = (len(tokenizer(text)["input_ids"]) for text in (before, before + rest))
            assert abs(in_front - depth * all_of_it) <= 30


@pytest.mark.parametrize("name", ["keyvalue", "lines"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_asked_record_stands_at_the_depth(name, depth):
    prompt = build(case(name, 3000, depth))
    if name == "lines":
        records = [line for line in prompt.text.splitlines() if re.fullmatch(r"line [a-z-]+: REGISTER.* <\d+>", line)]
        names = [record.split(":")[0] for record in records]
        asked = prompt.text.splitlines()[-1].split(":")[0]
    else:
        data, _, question = prompt.text.partition("JSON data:\n")[2].partition("\n\nKey: ")
        names = list(json.loads(data))
        asked = json.loads(question.splitlines()[0])
        assert json.loads(data)[asked] == prompt.expected[0]
    assert len(set(names)) == len(names) == prompt.units + 1
    assert names.index(asked) == round(depth * prompt.units)


def test_passkey_has_the_published_form():
    lines = build(case("passkey", 600, 0.5)).text.split("\n")
    number = build(case("passkey", 600, 0.5)).expected[0]
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert lines[0].startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert lines[1].startswith(garbage)
    assert lines[2] == f"The pass key is {number}. Remember it. {number} is the pass key."
    assert lines[3].startswith(garbage)
    assert lines[4:] == ["What is the pass key? The pass key is"]
    drawn = [int(build(case("passkey", 300, 0.5, sample=i)).expected[0]) for i in range(200)]
    assert 1 <= min(drawn) < 2000
    assert 48000 < max(drawn) < 50000
    assert len(set(drawn)) > 190


@pytest.mark.parametrize("keys, values", [(1, 1), (3, 1), (1, 4), (4, 3)])
def test_needles_of_every_name_are_there_and_one_name_is_asked(keys, values):
    prompt = build(case("needle", 2500, 0.25, keys=keys, values=values), filler=STORY)
    found = re.findall(r"A secret number of (\w+) is (\d{6})\.", prompt.text)
    asked = re.search(r"secret numbers? of (\w+) in the text above", prompt.text)[1]
    assert len(found) == keys * values == len({number for _, number in found})
    assert len({name for name, _ in found}) == keys
    assert sorted(number for name, number in found if name == asked) == sorted(prompt.expected)
    assert TASKS["needle"].has_depth({"keys": keys, "values": values}) == (values == 1)


@pytest.mark.parametrize("chains, hops", [(1, 0), (2, 3), (5, 2)])
def test_variables_follow_from_the_assignments(chains, hops):
    prompt = build(case("variables", 2500, chains=chains, hops=hops))
    values = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt.text):
        values[name] = values.get(source, source)  # a variable is assigned before it is used
    asked = re.search(r"hold the value (\d+) in", prompt.text)[1]
    assert len(values) == chains * (hops + 1)
    assert {name for name, value in values.items() if value == asked} == set(prompt.expected)
    assert len(prompt.expected) == hops + 1
    assert len(set(values.values())) == chains


@pytest.mark.parametrize("topics", [2, 7])
def test_topics_share_the_length_and_the_first_is_expected(topics):
    prompt = build(case("topics", 4000, topics=topics))
    opened = re.findall(r"USER: I would like to discuss the topic of (.*)\.\n", prompt.text)
    assert len(opened) == len(set(opened)) == topics
    assert prompt.expected == (opened[0],)
    turns = [part.count("USER:") for part in prompt.text.split("USER: I would like to discuss the topic of")[1:]]
    turns[-1] -= 1  # the question
    assert max(turns) - min(turns) <= 1
    assert sum(turns) == prompt.units


def test_haystack_text_stands_in_for_the_filler_and_begins_where_drawn():
    prompts = [build(case("needle", 1500, 0.5, sample=i), filler=STORY) for i in range(3)]
    begins = [int(re.search(r"On day (\d+)", prompt.text)[1]) for prompt in prompts]
    assert len(set(begins)) == 3
    days = [int(day) for day in re.findall(r"On day (\d+)", prompts[0].text)]
    assert days == [(days[0] + i) % 4000 for i in range(prompts[0].units)]


def test_filler_that_ends_too_early_is_an_error():
    short = Filler(STORY.sentences[:20], repeats=False)
    with pytest.raises(
        ValueError, match=r"length 3000 for task needle: all there is \(20 units of filler\) makes only"
    ):
        build(case("needle", 3000), filler=short)


def test_a_seed_gives_the_same_prompts_in_every_process():
    code = (
        "import hashlib, json, sys\n"
        "from hici.eval.retrieval.base import REPEATED\nfrom hici.eval.retrieval.fit import Case\n"
        "from hici.eval.retrieval.tasks import retrieval_tasks\n"
        "made = {}\n"
        "for name, task in retrieval_tasks().items():\n"
        "    options = {option: value.default for option, value in task.options.items()}\n"
        "    case = Case(task, options, 900, 0.4 if task.has_depth(options) else None, 1, 0)\n"
        "    made[name] = hashlib.sha256(case.draft(REPEATED).text(40).encode()).hexdigest()\n"
        "print(json.dumps([made, hash('a'), 'torch' in sys.modules]))"
    )
    here = {
        name: hashlib.sha256(case(name, 900, 0.4, 1).draft(REPEATED).text(40).encode()).hexdigest() for name in TASKS
    }
    hashes = set()
    for hash_seed in ("1", "77"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made, hash_of_a, heavy = json.loads(done.stdout)
        assert made == here
        assert not heavy  # `hici eval retrieval --help` imports these too
        hashes.add(hash_of_a)
    assert len(hashes) == 2
    assert len(set(here.values())) == len(TASKS)


# of prompts with 12 units of filler: whoever changes one changes results, and raises PROMPTS in run.py
PINNED = {
    "keyvalue": "ce865bc599538e64",
    "lines": "5a9a3e97f105a251",
    "needle": "e2bf30d7f7fda232",
    "passkey": "e6ce673bbbd0ac3d",
    "topics": "405e362d1f85cd12",
    "variables": "3e3baad624d18f9e",
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_stay_what_they_are(name):
    text = case(name, 4096, 0.5, sample=1, seed=7).draft(REPEATED).text(12)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[name], text


def test_every_place_in_the_grid_has_a_prompt_of_its_own():
    seeds = {
        case(name, length, depth, sample, seed).own_seed
        for name in TASKS
        for length in (1024, 2048)
        for depth in (0.0, 0.5)
        for sample in (0, 1)
        for seed in (0, 1)
    }
    with_depth = sum(TASKS[name].has_depth(defaults(name)) for name in TASKS)
    assert len(seeds) == 8 * (2 * with_depth + len(TASKS) - with_depth)
    assert max(seeds) < 2**53  # exact in every JSON reader
    assert seed_of(1, "a") != seed_of("1", "a")


def test_draws_are_even_and_independent():
    draws = Draws(5)
    counts = [0] * 10
    for _ in range(2000):
        counts[draws.below(10)] += 1
    assert min(counts) > 140
    assert max(counts) < 260
    assert sorted(draws.sample(range(50), 50)) == list(range(50))
    one, other = draws.stream("a"), draws.stream("b")
    assert [one.below(1000) for _ in range(5)] != [other.below(1000) for _ in range(5)]
    assert [Draws(5).stream("a").below(1000)] == [draws.stream("a").below(1000)]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", draws.uuid())
    assert {draws.between(3, 5) for _ in range(60)} == {3, 4, 5}


@pytest.mark.parametrize(
    "hidden, expected",
    [
        ([(0.0, "X.")], "X. aaa. bbbbb. c."),
        ([(1.0, "X.")], "aaa. bbbbb. c. X."),
        ([(0.45, "X.")], "aaa. X. bbbbb. c."),
        ([(0.65, "X.")], "aaa. bbbbb. X. c."),
        ([(0.9, "Y."), (0.1, "X."), (0.1, "Z.")], "X. Z. aaa. bbbbb. Y. c."),
    ],
)
def test_hidden_sentences_stand_at_the_nearest_border(hidden, expected):
    assert hide(["aaa.", "bbbbb.", "c."], hidden) == expected


def test_the_place_of_a_depth():
    assert [place(depth, 9) for depth in (0.0, 0.05, 0.06, 0.5, 1.0)] == [0, 0, 1, 5, 9]


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown retrieval task 'passkeys'; known: .* Did you mean 'passkey'\?"):
        get_task("passkeys")


def test_room_counts_what_the_tokenizer_makes_of_the_answer():
    letters, bytes_ = (answer_room(prompt_tokenizer(kind), "It is", "12345") for kind in ("letters", "bytes"))
    assert letters == len(" It is 12345.") + 8
    assert bytes_ < letters
