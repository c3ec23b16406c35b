"""A result is taken over only from the very same weights, tokenizer and settings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def copied(base_directory, tmp_path):
    """A base of its own, to be changed."""
    return shutil.copytree(base_directory, tmp_path / "base")


def ppl(model, text_file, out, *more):
    return ["eval", "ppl", model, "--data", text_file, "--context", 64, "--max-windows", 1, "--out", out, *more]


def test_weights_that_differ_anywhere(copied, text_file, tmp_path, hici_command):
    assert hici_command(*ppl(copied, text_file, tmp_path / "out")).status == 0
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"].view(-1)[1] += 2**-12  # between those that the fingerprint samples
    save_file(tensors, file, metadata={"format": "pt"})
    done = hici_command(*ppl(copied, text_file, tmp_path / "out"))
    assert (done.status, done.out) == (2, "")
    assert "is of another measurement: its model.weights_checksum is" in done.err
    assert hici_command(*ppl(copied, text_file, tmp_path / "out"), "--overwrite").status == 0


@pytest.mark.parametrize("what", ["tokenizer_fingerprint", "end_token_id"])
def test_another_chat_template_and_another_end_of_text(what, copied, tmp_path, hici_command):
    arguments = ["eval", "retrieval", copied, "--chat", "--lengths", 500, "--depths", 1, "--samples", 1,
                 "--allow-beyond-rope", "--out", tmp_path / "out"]  # fmt: skip
    assert hici_command(*arguments).status == 0
    if what == "tokenizer_fingerprint":
        with (copied / "chat_template.jinja").open("a") as file:
            file.write("Answer: ")
    else:
        settings = json.loads((copied / "generation_config.json").read_text())
        (copied / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 7]}))
    done = hici_command(*arguments)
    assert (done.status, done.out) == (2, "")
    assert f"is of another measurement: its model.{what} is" in done.err


def test_random_modules_that_are_not_used_do_not_count(base_directory, text_file, tmp_path, hici_command):
    flags = ["--attention", "hici", "--no-slots", "--segment-size", 32]
    first = hici_command(*ppl(base_directory, text_file, tmp_path / "out", *flags))
    torch.rand(1)  # the next modules are others
    again = hici_command(*ppl(base_directory, text_file, tmp_path / "out", *flags))
    assert (first.status, again.status) == (0, 0), again.err
    assert again.out == first.out
    assert "holds this very measurement already" in again.err
    other = hici_command(*ppl(base_directory, text_file, tmp_path / "out", *flags[:-1], 16))
    assert "its model.hici.segment_size is 32, now 16" in other.err


def test_hici_settings_count_only_where_they_are_used(adapter_directory, text_file, tmp_path, hici_command):
    assert hici_command(*ppl(adapter_directory, text_file, tmp_path / "full")).status == 0
    assert hici_command(*ppl(adapter_directory, text_file, tmp_path / "hici", "--attention", "hici")).status == 0
    full, hici = (json.loads((tmp_path / name / "ppl-strict.json").read_text())["model"] for name in ("full", "hici"))
    assert (full.pop("hici"), hici.pop("hici")["segment_size"]) == (None, 16)
    assert full == hici
