"""Instruction samples: the answers, all of them and nothing else, are learned; long samples lose no answer."""

import string

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from hici.data.prompts import encode_sample, render_chat

SAMPLE = {"instruction": "Add {input} to it.", "input": "", "output": " The answer, {instruction}.\n"}
WITH_INPUT = {**SAMPLE, "input": "1, 2"}
TURNS = [
    {"role": "system", "content": "Ask me: who?"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "It is me. "},
    {"role": "user", "content": "and there, who?"},
    {"role": "assistant", "content": "\nYou."},
]
# Llama 2's: BOS and EOS are the template's own
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# shows only the last answer with its thoughts, so that a beginning is no beginning of the whole
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# no beginning of an answer when it is asked for one
SILENT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
LOOKING_BACK = "{{ messages | length }} messages" + SILENT
BLIND = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"


def parts(sample, tokenizer, prompt):
    """(whole text, what is learned, what may be shortened)."""
    (encoded,) = encode_sample(sample, tokenizer, prompt, "a.jsonl:1")
    assert len(encoded.ids) == len(encoded.kinds)
    return [
        tokenizer.decode(encoded.ids[mask]) for mask in (encoded.kinds >= 0, encoded.kinds == 1, encoded.kinds == 2)
    ]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "prompt, sample, text, user",
    [
        ("alpaca", SAMPLE, "completes the request.\n\n### Instruction:\nAdd {input} to it.\n\n### Response:",
         "Add {input} to it."),
        ("alpaca", WITH_INPUT, "request.\n\n### Instruction:\nAdd {input} to it.\n\n### Input:\n1, 2\n\n### Response:",
         "Add {input} to it."),
        ("alpaca", {**WITH_INPUT, "input": "a long input {input}"},
         "### Instruction:\nAdd {input} to it.\n\n### Input:\na long input {input}\n\n### Response:",
         "a long input {input}"),
        ("llama2", {**SAMPLE, "input": " " * 90}, "[INST] Add {input} to it. [/INST]", "Add {input} to it."),
        ("llama2", SAMPLE, "[INST] Add {input} to it. [/INST]", "Add {input} to it."),
        ("llama2", WITH_INPUT, "[INST] Add {input} to it.\n1, 2 [/INST]", "Add {input} to it."),
    ],
)  # fmt: skip
def test_fixed_prompts_learn_the_answer_and_eos(prompt, sample, text, user, bos, make_tokenizer):
    whole, answer, shortened = parts(sample, make_tokenizer(bos=bos), prompt)
    assert answer == sample["output"] + "</s>"
    assert whole.endswith(text + answer)
    assert shortened == user
    assert whole.startswith("<s>") == bos
    assert whole.count("<s>") == bos
    assert ("paired with an input" in whole) == (prompt == "alpaca" and sample["input"] != "")


def test_chatml_learns_every_turn_of_the_assistant(chat):
    whole, answers, user = parts({"messages": TURNS}, chat, "chat")
    assert whole == chat.apply_chat_template(TURNS, tokenize=False)
    assert answers == "It is me. <|im_end|>\nYou.<|im_end|>"
    assert user == "and there, who?"
    # the same words stand in the system message, and are not the user's there
    turns = [TURNS[0], TURNS[1], TURNS[2]]
    (encoded,) = encode_sample({"messages": turns}, chat, "chat", "x")
    before = chat.decode(encoded.ids[: (encoded.kinds == 2).argmax()])
    assert before == "<|im_start|>system\nAsk me: who?<|im_end|>\n<|im_start|>user\n"


def test_a_template_with_bos_eos_and_trimmed_contents(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA2, bos=True)
    whole, answers, user = parts({"messages": TURNS[1:]}, tokenizer, "chat")
    assert whole == "<s>[INST] who? [/INST] It is me. </s><s>[INST] and there, who? [/INST] You. </s>"
    assert answers == " It is me. </s> You. </s>"
    assert user == "and there, who?"


def test_a_template_without_ends_gets_an_eos_behind_the_last_answer(make_tokenizer):
    whole, answers, _ = parts({"messages": TURNS[1:]}, make_tokenizer(PLAIN), "chat")
    assert answers == "It is me. \n\nYou.\n</s>"
    assert whole.endswith("assistant: \nYou.\n</s>")
    rest = [*TURNS, {"role": "user", "content": "unanswered"}]
    whole, answers, _ = parts({"messages": rest}, make_tokenizer(PLAIN), "chat")
    assert (answers, whole[-17:]) == ("It is me. \n\nYou.\n", "user: unanswered\n")


def test_instructions_in_a_chat_template_and_what_auto_is(chat, tokenizer):
    chatted = parts(WITH_INPUT, chat, "chat")
    assert chatted[0].startswith("<|im_start|>user\nAdd {input} to it.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n The")
    assert chatted[1] == WITH_INPUT["output"] + "<|im_end|>"
    assert parts(WITH_INPUT, chat, "auto") == chatted
    assert parts(WITH_INPUT, tokenizer, "auto") == parts(WITH_INPUT, tokenizer, "alpaca")
    assert parts({"messages": TURNS}, chat, "auto") == parts({"messages": TURNS}, chat, "chat")


@pytest.mark.parametrize(
    "template, prompt, sample, message",
    [
        (LOOKING_BACK, "chat", {"messages": TURNS}, "x:1: .* renders the 2 messages before an answer not as .* alpaca"),
        (BLIND, "chat", {"messages": TURNS}, "x:1: .* ignores add_generation_prompt and does not show .* alpaca"),
        (REFUSING, "chat", {"messages": TURNS}, "x:1: .*refuses the messages .no system here.; change the sample"),
        (None, "auto", {"messages": TURNS}, "needs a chat template, and the tokenizer has none; use prompt: alpaca"),
        (PLAIN, "alpaca", {"messages": TURNS}, "x:1 has messages, but prompt 'alpaca' is for instruction and output"),
    ],
)
def test_templates_that_cannot_be_used(template, prompt, sample, message, make_tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_sample(sample, make_tokenizer(template), prompt, "x:1")


def test_the_spans_of_the_rendered_text(chat):
    (rendered,) = render_chat(TURNS, chat, "x")
    assert [rendered.text[a:b] for a, b in rendered.answers] == ["It is me. <|im_end|>", "\nYou.<|im_end|>"]
    assert not rendered.close


def test_a_template_that_ignores_the_generation_prompt(make_tokenizer):
    turns = [*TURNS, {"role": "user", "content": "assistant"}, {"role": "assistant", "content": "assistant"}]
    whole, answers, _ = parts({"messages": turns}, make_tokenizer(SILENT), "chat")
    assert whole == make_tokenizer(SILENT).apply_chat_template(turns, tokenize=False)
    assert answers == "It is me.<|im_end|>You.<|im_end|>assistant<|im_end|>"
    # with a space in front of the content, which is the word's own
    whole, answers, _ = parts({"messages": TURNS[1:]}, make_tokenizer(PLAIN.partition("{% if")[0]), "chat")
    assert answers == " It is me. \n \nYou.\n</s>"


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_of_each_answer(make_tokenizer, prepared, write, caplog):
    thinking = make_tokenizer(THINKING)
    found = encode_sample({"messages": [*TURNS, TURNS[1]]}, thinking, "chat", "x")
    assert [thinking.decode(encoded.ids) for encoded in found] == [
        thinking.apply_chat_template(TURNS[:number], tokenize=False) for number in (3, 5)
    ]
    answers = [thinking.decode(encoded.ids[encoded.kinds == 1]) for encoded in found]
    assert answers == ["<think></think>It is me. <|im_end|>", "<think></think>\nYou.<|im_end|>"]
    assert [thinking.decode(encoded.ids[encoded.kinds == 2]) for encoded in found] == ["who?", "and there, who?"]
    conversations = [[*TURNS[:3], {"role": "user", "content": f"question {i}"}, TURNS[4]] for i in range(3)]
    path = write("a.jsonl", [{"messages": turns} for turns in [TURNS[1:3], *conversations]])
    data = prepared(path, tokenizer=thinking, data_format="instruction", length=400)
    assert [data.train.documents.source(i) for i in range(7)] == [f"{path}:{n}" for n in (1, 2, 2, 3, 3, 4, 4)]
    assert f"{path}: the chat template rewrites earlier turns, so 4 conversations became 7 samples" in caplog.text


def test_the_day_is_no_part_of_the_tokens(make_tokenizer, chat):
    day = "{% if strftime_now is defined %}{{ strftime_now('%-d %d %b %Y') }}, {% endif %}"
    dated = make_tokenizer("\n  " + day + "{{ strftime_now('%T.%f') }}: " + chat.chat_template)
    whole, answers, _ = parts({"messages": TURNS[1:3]}, dated, "chat")
    assert whole.startswith("\n26 26 Jul 2024, 00:00:00.000000: <|im_start|>user\n")
    assert answers == "It is me. <|im_end|>"


def pieces(merges=()):
    """A tokenizer as of SentencePiece: ▁ in front of each text and for each space; tokens are letters and `merges`."""
    alphabet = "▁\n[]/.,:?" + string.ascii_letters
    letters = {letter: i for i, letter in enumerate(alphabet)}
    vocabulary = {**letters, **{a + b: len(letters) + i for i, (a, b) in enumerate(merges)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def learned(tokenizer, template, turns=TURNS[1:]):
    """Tokens of a conversation's answers; those of the whole are those that a model is asked with."""
    tokenizer.chat_template = template
    (encoded,) = encode_sample({"messages": turns}, tokenizer, "chat", "x")
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    closed = "</s>" in text or turns[-1]["role"] == "user"
    assert encoded.ids.tolist() == (whole if closed else [*whole, tokenizer.eos_token_id])
    return tokenizer.convert_ids_to_tokens(encoded.ids[encoded.kinds == 1].tolist())


def test_a_conversation_has_the_tokens_of_its_whole_text():
    tokenizer = pieces([("▁", "I"), ("▁", "Y"), ("\n", "Y")])
    # one ▁ in front of the first word of an answer, where the template has one space, and none of the tokenizer's
    assert "".join(learned(tokenizer, LLAMA2)) == "▁It▁is▁me.▁</s>▁You.▁</s>"
    assert learned(tokenizer, LLAMA2)[0] == "▁I"
    # without a border's space in the template, the answer's first token begins in the prompt: it is not learned
    turns = [TURNS[1], {"role": "assistant", "content": "It is"}]
    assert learned(tokenizer, PLAIN, turns) == [*"t▁is\n", "</s>"]
    assert learned(tokenizer, PLAIN.replace("assistant: ", "assistant:"), turns) == ["▁I", *"t▁is\n", "</s>"]
    # nor is a last one that ends behind the answer
    assert learned(pieces([("\n", "u")]), PLAIN, [*turns, TURNS[1]]) == [*"It▁is"]


def test_a_sample_whose_answer_has_no_token_of_its_own_is_left_out(prepared, write, caplog):
    tokenizer = pieces([("▁", "I"), ("\n", "u")])
    tokenizer.chat_template = PLAIN
    turns = [TURNS[1], {"role": "assistant", "content": "I"}, {"role": "user", "content": "u"}]
    path = write("a.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    data = prepared(path, tokenizer=tokenizer, data_format="instruction", length=200)
    assert [data.train.documents.source(i) for i in range(len(data.train))] == [f"{path}:2"]
    assert f"{path}: 1 empty records are left out" in caplog.text


# what follows goes through `prepare`

FORMAT = {"data_format": "instruction", "length": 200}


def labels(row, tokenizer):
    targets = row["labels"]
    assert (targets[targets != -100] == row["input_ids"][targets != -100]).all()
    return tokenizer.decode(targets[targets != -100])


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_rows_of_samples(name, prepared, chat, write):
    records = [{**WITH_INPUT, "output": f"answer {i}", "file": "of LongAlpaca"} for i in range(5)]
    path = write(name, [*records, {**SAMPLE, "output": " "}])
    data = prepared(path, tokenizer=chat, **FORMAT)
    assert sorted(labels(row, chat) for row in data.train) == [f"answer {i}<|im_end|>" for i in range(5)]
    assert {len(row["input_ids"]) for row in data.train} == {len(data.train[0]["input_ids"])}
    assert data.summary["answer_tokens"] == 5 * 9
    assert [data.summary[f"samples_{x}"] for x in ("overlong", "skipped", "shortened")] == [0, 0, 0]
    messages = [{"messages": TURNS}]
    both = prepared(write("m.jsonl", messages), path, tokenizer=chat, **FORMAT)
    assert both.summary["documents"] == 6
    split = prepared(path, tokenizer=chat, heldout_windows=2, heldout_fraction=0.4, **FORMAT)
    assert (split.summary["documents"], len(split.heldout)) == (3, 2)


def test_over_long_samples(prepared, chat, write, caplog):
    frame = len(chat.apply_chat_template([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
                                         tokenize=True, return_dict=True)["input_ids"])  # fmt: skip
    short, long = {**SAMPLE, "instruction": "short"}, {**SAMPLE, "instruction": "".join(f"{i:02}" for i in range(50))}
    hopeless = {**SAMPLE, "instruction": "some", "output": "x" * 80}
    path = write("x.jsonl", [short, long, hopeless])
    options = {**FORMAT, "length": 90, "tokenizer": chat}
    skipped = prepared(path, **options)
    assert [labels(row, chat) for row in skipped.train] == [SAMPLE["output"] + "<|im_end|>"]
    assert [skipped.summary[f"samples_{x}"] for x in ("overlong", "skipped", "shortened")] == [2, 2, 0]
    assert "2 of 3 samples are longer than 90 tokens (the first one, " in caplog.text
    assert f"{path}:2, has {frame + 100 + len(SAMPLE['output'])}" in caplog.text
    data = prepared(path, overlong="shorten", **options)
    assert [data.summary[f"samples_{x}"] for x in ("overlong", "skipped", "shortened")] == [2, 1, 1]
    row = max(data.train, key=lambda row: len(row["input_ids"]))
    assert len(row["input_ids"]) == 90
    assert labels(row, chat) == SAMPLE["output"] + "<|im_end|>"
    kept = 90 - frame - len(SAMPLE["output"])
    head, tail = kept - kept // 2, kept // 2
    content = chat.decode(row["input_ids"]).partition("user\n")[2].partition("<|im_end|>")[0]
    assert content in (long["instruction"][:head] + long["instruction"][-tail:],
                       long["instruction"][:tail] + long["instruction"][-head:])  # fmt: skip
    assert data.summary["tokens_outside_of_whole_sequences"] == 100 - kept
    with pytest.raises(
        ValueError, match=r"2 of 3 samples are longer than context_length=90; the first one, .*x.jsonl:2"
    ):
        prepared(path, overlong="error", **options)
    with pytest.raises(ValueError, match="no sample is left: 1 of 1 samples are longer.*give a longer context_length"):
        prepared(write("y.jsonl", [hopeless]), overlong="shorten", **options)


@pytest.mark.parametrize("over", [0, 1, 2])
def test_an_answer_is_never_cut(over, prepared, chat, write):
    """At least one token of the user's stays; a sample for which that is not enough is left out."""
    path = write(
        "x.jsonl",
        [{**SAMPLE, "instruction": "abc", "output": "the answer"}, {**SAMPLE, "instruction": "a", "output": "b"}],
    )
    size = max(len(row["input_ids"]) for row in prepared(path, tokenizer=chat, **FORMAT).train if
               "the answer" in labels(row, chat))  # fmt: skip
    data = prepared(path, tokenizer=chat, overlong="shorten", data_format="instruction", length=size - 2 - over)
    assert ("the answer<|im_end|>" in {labels(row, chat) for row in data.train}) == (over == 0)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "text", r"a\.txt is plain text, but data_format is instruction.*use data_format: text"),
        ("a.bin", b"\x01\x00", r"a\.bin is a token file, but data_format is instruction"),
        ("a.jsonl", [{"instruction": "a", "outptu": "b"}], r"a\.jsonl:1 is no .*'output'.*known: .*mean 'outptu'"),
        ("a.jsonl", [{"instruction": 3, "output": "b"}], r"a\.jsonl:1 holds int under 'instruction'"),
        ("a.jsonl", [{"instruction": "a", "output": ""}], "there is no text or answer in it .1 empty records"),
        ("a.jsonl", [{"messages": []}], "there is no text or answer in it .1 empty records"),
        ("a.jsonl", [{"messages": "hello"}], "messages is str, but it is a list of role and content"),
        ("a.jsonl", [{"messages": [{"role": "user"}]}], "it has a role and a content"),
        (
            "a.jsonl",
            [{"messages": [{"role": "asistant", "content": "a"}]}],
            "role of a message 'asistant'.*'assistant'",
        ),
        ("a.jsonl", [{"messages": [{"role": "user", "content": None}]}], "the content of a message is NoneType"),
        ("a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}], "answers before the user asks"),
    ],
)
def test_bad_samples_are_named(prepared, chat, write, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        prepared(write(name, content), tokenizer=chat, **FORMAT)
    assert name in str(error.value)


def test_prompts_and_tokenizers_that_do_not_fit(prepared, tokenizer, write):
    path = write("a.jsonl", [SAMPLE])
    with pytest.raises(ValueError, match="unknown prompt 'alpacca'; known: alpaca, auto, chat, llama2.*mean 'alpaca'"):
        prepared(path, prompt="alpacca", **FORMAT)
    with pytest.raises(ValueError, match="needs a chat template, and the tokenizer has none"):
        prepared(path, prompt="chat", **FORMAT)

    class Slow:
        is_fast, chat_template = False, None

    with pytest.raises(ValueError, match="needs a fast tokenizer, and Slow is a slow one"):
        prepared(path, tokenizer=Slow(), vocab_size=300, **FORMAT)
