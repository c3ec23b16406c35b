"""`hici generate`: greedy is model.generate, draws follow the seed, prompts from everywhere, refusals."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM

import hici
from hici.models.generate import encode_prompt, generate
from hici.models.modes import set_attention

PROMPT = "the cat sees the river and the old dog runs over"


@pytest.fixture(autouse=True)
def _piped(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))


def expected_greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                             pad_token_id=0)  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_greedy_equals_the_models_own_generate(adapter_directory, tokenizer, attention, hici_command):
    model = hici.from_pretrained(adapter_directory, attention=attention)
    expected = expected_greedy(model, tokenizer, PROMPT, 12)
    result = generate(model, tokenizer, encode_prompt(tokenizer, PROMPT), max_new_tokens=12)
    assert result.tokens == expected
    done = hici_command("generate", adapter_directory, "--prompt", PROMPT, "--max-new-tokens", 12, "--attention",
                        attention)  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")
    assert f"{result.prompt_tokens} prompt tokens, 12 new tokens" in done.err
    assert "new tokens/s" in done.err
    assert ("visibility past; new tokens attend to raw keys" in done.err) is (attention == "hici")


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
        order = model(ids).logits[0, -1].argsort(descending=True).tolist()
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
    assert tokenizer.decode(ids[0]) == f"[user] {PROMPT}[assistant]"
    done = hici_command("generate", base_directory, "--prompt", PROMPT, "--chat", "--max-new-tokens", 3)
    assert f"{ids.shape[1]} prompt tokens" in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "both given"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file does not exist"),
        (["--prompt", PROMPT, "--max-new-tokens", 500], "tokens are more than the 128 positions"),
        (["--prompt", PROMPT, "--temperature", -1], "temperature=-1.0 is not a number >= 0"),
        (["--prompt", PROMPT, "--temperature", "nan"], "temperature=nan is not a number >= 0"),
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
