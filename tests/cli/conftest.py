"""A tiny tokenizer, model and adapter directory on disk, and running the command in this process."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

import hici
from helpers import assert_slots_matter, randomise, small_config, tiny_model
from hici.cli.main import main
from random_sentences import sentences

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def hici_command(capsys, monkeypatch):
    """Run `hici ...` in this process: (exit status, stdout, stderr)."""

    def command(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse: --help, --version
            status = exit_.code or 0
        return Done(status, *capsys.readouterr())

    return command


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of about 300 entries, trained here."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet)
    core.train_from_iterator([sentences(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def base_directory(tokenizer, tmp_path_factory):
    """A plain transformers model with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapter_directory(base_directory, tokenizer, tmp_path_factory):
    """What `hici train` leaves behind: LoRA, embeddings, norms and HiCI modules, all far from their first values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    hici.attach(model, small_config(visibility="past", segment_size=16))
    with torch.no_grad():
        for attention in (layer.self_attn for layer in model.model.layers):
            modules = {name: getattr(attention, name) for name in ("local_constructor", "global_integrator")}
            randomise(torch.nn.ModuleDict(modules), seed=7)
    assert_slots_matter(model)
    wrapped = hici.add_lora(model, r=2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    hici.save_pretrained(wrapped, directory, tokenizer=tokenizer)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """About 1,000 tokens of text."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(sentences(60, seed=1))
    return path
