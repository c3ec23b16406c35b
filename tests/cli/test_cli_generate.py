"""`hici generate`: greedy is model.generate, draws follow the seed, prompts from everywhere, refusals."""

import copy
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM

import hici
from hici.models.generate import encode_prompt
from hici.models.generate import generate as generate_in_session
from hici.models.modes import set_attention
from hici.models.session import Session

PROMPT = "the cat sees the river and the old dog runs over"


@pytest.fixture(autouse=True)
def _piped(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))


def generate(model, tokenizer, ids, **options):
    """In a session of its own."""
    return generate_in_session(Session(model), tokenizer, ids, **options)


def expected_greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                             pad_token_id=0)  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("attention, decode", [("full", None), ("hici", None), ("hici", "auto"), ("hici", "raw")])
def test_greedy_equals_the_models_own_generate(adapter_directory, tokenizer, attention, decode, hici_command):
    model = hici.from_pretrained(adapter_directory, attention=attention)
    if decode is not None:
        hici.reconfigure(model, decode=decode)
    expected = expected_greedy(model, tokenizer, PROMPT, 12)
    result = generate(model, tokenizer, encode_prompt(tokenizer, PROMPT), max_new_tokens=12)
    assert result.tokens == expected
    done = hici_command("generate", adapter_directory, "--prompt", PROMPT, "--max-new-tokens", 12, "--attention",
                        attention, *(() if decode is None else ("--decode", decode)))  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")
    assert f"{result.prompt_tokens} of {result.prompt_tokens} prompt tokens read in" in done.err
    assert re.search(r"tokens/s\), 12 new tokens at [\d.]+ tokens/s", done.err)
    assert re.search(r"peak memory [\d.]+ GiB\n$", done.err)
    assert ("visibility past; new tokens attend to raw keys" in done.err) is (decode == "raw")
    bounded = attention == "hici" and decode != "raw"
    assert ("visibility past, in memory that does not grow (segments of 16 tokens)" in done.err) is bounded
    assert ("; cache " in done.err) is (decode != "raw")


def test_attention_matters(adapter_directory, tokenizer):
    model = hici.from_pretrained(adapter_directory)
    ids = encode_prompt(tokenizer, PROMPT * 2)
    tokens = {}
    for attention in ("full", "hici"):
        set_attention(model, attention)
        tokens[attention] = generate(model, tokenizer, ids, max_new_tokens=12).tokens
    assert tokens["full"] != tokens["hici"]


def test_draws_follow_the_seed_and_leave_the_random_state(base_directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    ids = encode_prompt(tokenizer, PROMPT)

    def draw(seed, **options):
        return generate(model, tokenizer, ids, max_new_tokens=16, temperature=3.0, seed=seed, **options).tokens

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)
    # the most probable token alone is the greedy one
    assert draw(1, top_p=1e-6) == generate(model, tokenizer, ids, max_new_tokens=16).tokens


def test_the_models_own_settings_do_not_leak_in(base_directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    ids = encode_prompt(tokenizer, PROMPT)
    expected = generate(model, tokenizer, ids, max_new_tokens=16, temperature=3.0, seed=4).tokens
    greedy = generate(model, tokenizer, ids, max_new_tokens=16).tokens
    own = model.generation_config
    own.do_sample, own.top_k, own.repetition_penalty, own.temperature, own.min_new_tokens = True, 1, 5.0, 0.1, 20
    own.no_repeat_ngram_size, own.min_p, own.num_beams = 1, 0.9, 3
    assert generate(model, tokenizer, ids, max_new_tokens=16, temperature=3.0, seed=4).tokens == expected
    assert generate(model, tokenizer, ids, max_new_tokens=16).tokens == greedy
    assert (own.top_k, own.repetition_penalty) == (1, 5.0)  # and they are left as they were


def test_without_top_p_every_token_can_be_drawn(base_directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    ids = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    # nearly uniform over all entries: not only over the 50 that transformers' default top_k would leave
    first = [generate(model, tokenizer, ids, max_new_tokens=1, temperature=1e4, seed=i).tokens[0] for i in range(12)]
    assert max(order.index(token) for token in first) > 50


def test_it_stops_at_the_end_of_text(base_directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    ids = encode_prompt(tokenizer, PROMPT)
    greedy = generate(model, tokenizer, ids, max_new_tokens=8)
    model.generation_config.eos_token_id = greedy.tokens[3]
    stopped = generate(model, tokenizer, ids, max_new_tokens=8)
    assert stopped.tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[3]) + 1]
    assert (stopped.ended, greedy.ended) == (True, False)


def test_prompt_from_flag_file_and_stdin(base_directory, tmp_path, hici_command):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    common = ["generate", base_directory, "--max-new-tokens", 5]
    texts = [hici_command(*common, *how) for how in (["--prompt", PROMPT], ["--prompt-file", file], [])]
    assert [done.status for done in texts] == [0, 0, 0]
    assert len({done.out for done in texts}) == 1
    assert texts[0].out


def test_chat_uses_the_template(base_directory, tokenizer, hici_command):
    ids = encode_prompt(tokenizer, PROMPT, chat=True)
    assert tokenizer.decode(ids) == f"[user] {PROMPT}[assistant]"
    done = hici_command("generate", base_directory, "--prompt", PROMPT, "--chat", "--max-new-tokens", 3)
    assert f"{len(ids)} of {len(ids)} prompt tokens" in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "both given"),
        (["--prompt", "a", "--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--document", "/no/such/file"], "--document /no/such/file does not exist"),
        (["--prompt", "a", "--document-cache", "x"], "--document-cache x without --document; give the document too"),
        (["--prompt", "a", "--decode", "raw"], "--decode raw changes nothing in attention full; add --attention hici"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file does not exist"),
        (["--prompt", PROMPT, "--max-new-tokens", 500], "tokens are more than the 128 positions"),
        (["--prompt", PROMPT, "--temperature", -1], "temperature=-1.0 is not a number >= 0"),
        (["--prompt", PROMPT, "--temperature", "nan"], "temperature=nan is not a number >= 0"),
        (["--prompt", PROMPT, "--temperature", "1e-45"], "is too near to 0 to divide by; give 0 (greedy) or at least"),
        (["--prompt", PROMPT, "--seed", 10**23], "is not an integer from 0 to 2**63 - 1"),
        (["--prompt", PROMPT, "--top-p", 0.5], "--top-p 0.5 changes nothing at temperature 0 (greedy); add --temp"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text"),
        (["--prompt", PROMPT, "--top-p", 0], "top_p=0.0 is not in (0, 1]"),
        (["--prompt", PROMPT, "--attention", "hici"], "fresh random ones"),
        (["--prompt", PROMPT, "--max-new-tokens", 0], "'0' is not an integer >= 1"),
    ],
    ids=str,
)
def test_refusals(arguments, message, base_directory, hici_command):
    done = hici_command("generate", base_directory, *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_empty_stdin(base_directory, monkeypatch, hici_command):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the prompt is empty" in hici_command("generate", base_directory).err


def test_a_terminal_is_not_read(base_directory, monkeypatch, hici_command):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "no prompt; give --prompt" in hici_command("generate", base_directory).err


def test_chat_without_a_template(tokenizer):
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(plain, "a", chat=True)


def test_beyond_the_rope_when_allowed(base_directory, hici_command):
    done = hici_command("generate", base_directory, "--prompt", PROMPT, "--max-new-tokens", 130, "--allow-beyond-rope")
    assert done.status == 0, done.err


def test_several_prompts_are_each_by_itself(adapter_directory, hici_command):
    common = ["generate", adapter_directory, "--attention", "hici", "--max-new-tokens", 6]
    prompts = [PROMPT, "the river runs under the old house"]
    alone = [hici_command(*common, "--prompt", prompt).out for prompt in prompts]
    together = hici_command(*common, "--prompt", prompts[0], "--prompt", prompts[1])
    assert together.out == "".join(alone)
    assert alone[0] != alone[1]


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "document.txt"
    file.write_text("a blue tree sings. " * 6)
    return file


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("attention", ["full", "hici"])
def test_a_document_is_read_once(adapter_directory, tokenizer, document, attention, chat, hici_command):
    text, flags = document.read_text(), ["--chat"] if chat else []
    common = ["generate", adapter_directory, "--attention", attention, "--max-new-tokens", 6, *flags]
    done = hici_command(*common, "--document", document, "--prompt", "the cat", "--prompt", "a dog")
    assert done.status == 0, done.err
    whole = [hici_command(*common, "--prompt", f"{text}\n\n{prompt}") for prompt in ("the cat", "a dog")]
    assert done.out == "".join(x.out for x in whole)
    count = int(re.search(r"document of (\d+) tokens read", done.err)[1])
    assert count > 16  # more than a segment
    first, second = (int(b) - int(a) for a, b in re.findall(r"(\d+) of (\d+) prompt tokens read", done.err))
    assert first == count
    assert second == count or (attention == "full" and second > count)  # which goes back to where the prompts part


def test_a_document_is_kept_in_a_file(adapter_directory, document, tmp_path, hici_command):
    kept = tmp_path / "kept.hicicache"
    common = ["generate", adapter_directory, "--attention", "hici", "--max-new-tokens", 6, "--prompt", "the cat",
              "--document", document]  # fmt: skip
    plain = hici_command(*common)
    first = hici_command(*common, "--document-cache", kept)
    assert f"kept in {kept}" in first.err
    second = hici_command(*common, "--document-cache", kept)
    assert f"tokens taken from {kept}" in second.err
    assert plain.out == first.out == second.out != ""
    document.write_text("another document")
    other = hici_command(*common, "--document-cache", kept)
    assert (other.status, other.out) == (2, "")
    assert f"{kept} holds" in other.err
    assert "of another text" in other.err


def test_a_document_cache_needs_bounded_memory(adapter_directory, document, tmp_path, hici_command):
    common = [
        "generate",
        adapter_directory,
        "--prompt",
        "a",
        "--document",
        document,
        "--document-cache",
        tmp_path / "k",
    ]
    for flags, message in (
        ([], "in attention full, whose cache grows with the document; add --attention hici"),
        (
            ["--attention", "hici", "--decode", "raw"],
            "--document-cache: what was read is kept in a file only",
        ),
    ):
        done = hici_command(*common, *flags)
        assert done.status == 2
        assert message in done.err
        assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("place, message", [("", "is no file, but one is to be kept there"), ("f/x", "cannot|a file")])
def test_where_a_document_cannot_be_kept(document, tmp_path, place, message, hici_command):
    (tmp_path / "f").write_text("a file")
    done = hici_command("generate", "no/model", "--attention", "hici", "--prompt", "a", "--document", document,
                        "--document-cache", tmp_path / place)  # fmt: skip
    assert done.status == 2
    assert re.search(message, done.err)


def test_a_document_with_decode_over_raw_keys_is_read_with_every_prompt(adapter_directory, document, hici_command):
    common = ["generate", adapter_directory, "--attention", "hici", "--decode", "raw", "--max-new-tokens", 6]
    done = hici_command(*common, "--document", document, "--prompt", "the cat")
    assert "tokens are read with every prompt: raw keys allow one prefill only" in done.err
    assert done.out == hici_command(*common, "--prompt", f"{document.read_text()}\n\nthe cat").out


def test_num_segments_say_what_to_do(adapter_directory, hici_command):
    done = hici_command("generate", adapter_directory, "--prompt", "a", "--attention", "hici", "--num-segments", 4)
    assert done.status == 2
    assert "num_segments=4 with a HiCICache" in done.err
    assert "(--segment-size S)" in done.err
    assert "--decode raw" in done.err
    raw = hici_command("generate", adapter_directory, "--prompt", PROMPT, "--attention", "hici", "--num-segments", 4,
                       "--decode", "raw", "--max-new-tokens", 4)  # fmt: skip
    assert raw.status == 0, raw.err


def test_segments_without_slots_on_a_plain_model(base_directory, hici_command):
    common = [
        "generate",
        base_directory,
        "--prompt",
        PROMPT,
        "--attention",
        "hici",
        "--no-slots",
        "--max-new-tokens",
        6,
    ]
    done = hici_command(*common, "--segment-size", 8)
    assert "read and written with segments without slots, in memory that does not grow (segments of 8" in done.err
    one = hici_command(*common, "--segment-size", 128)
    assert one.out == hici_command("generate", base_directory, "--prompt", PROMPT, "--max-new-tokens", 6).out
    assert one.out != done.out


def test_closed_and_damaged_input(base_directory, monkeypatch, hici_command):
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9"))
    assert "standard input is not UTF-8 text; convert it" in hici_command("generate", base_directory).err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "standard input is not UTF-8 text; convert it" in hici_command("generate", base_directory).err
    monkeypatch.setattr("sys.stdin", None)
    for verb in ("generate", "chat"):
        assert "standard input is closed" in hici_command(verb, base_directory).err


@pytest.mark.parametrize("kind", ["prefix space", "appended end"])
def test_a_document_is_tokenised_together_with_the_prompt(adapter_directory, document, tokenizer, kind, monkeypatch,
                                                          hici_command):  # fmt: skip
    """Llama-2's tokenizer puts a space in front of a text, others an end behind it: neither belongs in the middle."""
    changed = copy.deepcopy(tokenizer)
    core = changed.backend_tokenizer
    if kind == "prefix space":
        core.normalizer = normalizers.Prepend("the ")
    else:
        core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    monkeypatch.setattr("hici.cli.common.load_tokenizer", lambda *_: changed)
    common = ["generate", adapter_directory, "--attention", "hici", "--max-new-tokens", 6]
    done = hici_command(*common, "--document", document, "--prompt", "the cat", "--prompt", "a dog")
    whole = [hici_command(*common, "--prompt", f"{document.read_text()}\n\n{x}") for x in ("the cat", "a dog")]
    assert done.out == "".join(x.out for x in whole)
    first, second = (int(a) for a, _ in re.findall(r"(\d+) of (\d+) prompt tokens read", done.err))
    assert max(first, second) < 10


def test_on_a_terminal_the_text_goes_where_it_should(adapter_directory, tmp_path):
    """A real terminal for input and messages: no progress bar takes the text away from a redirected output."""
    import pty

    target, (ours, theirs) = tmp_path / "out.txt", pty.openpty()
    command = [sys.executable, "-c", "import sys; from hici.cli.main import main; sys.exit(main())", "generate",
               str(adapter_directory), "--attention", "hici", "--decode", "raw", "--prompt", PROMPT]  # fmt: skip
    with target.open("w") as out:
        done = subprocess.run(
            [*command, "--max-new-tokens", "12"], stdin=theirs, stdout=out, stderr=theirs, timeout=300
        )
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, said
    assert target.read_text().strip()
    assert "12 new tokens" in said
    assert target.read_text().strip() not in said
