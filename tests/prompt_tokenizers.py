"""Small tokenizers with different habits: BOS or none, digits apart, a space in front, a token a letter."""

from __future__ import annotations

import functools
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hici.eval.retrieval.base import REPEATED
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.tasks import retrieval_tasks

KINDS = ("bytes", "bytes_bos", "sentencepiece", "sentencepiece_digits", "letters")


@functools.cache
def prompt_tokenizer(kind):
    """A tokenizer of that kind, trained on prompts of other seeds than the tests'."""
    special = ["<s>", "</s>"]
    if kind.startswith("bytes"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        size = 500
    else:
        core = Tokenizer(models.BPE(unk_token="<s>"))
        if kind == "letters":
            core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            core.decoder = decoders.Fuse()
            size = 130
        else:
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            if kind.endswith("digits"):
                core.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
            parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            core.decoder = decoders.Sequence(parts)
            size = 700
        alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, max_token_length=12, show_progress=False
    )
    core.train_from_iterator(_texts(), trainer)
    if kind in ("bytes_bos", "sentencepiece", "sentencepiece_digits"):
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _texts():
    generator = random.Random(3)
    for task in retrieval_tasks().values():
        options = {name: option.default for name, option in task.options.items()}
        for _ in range(3):
            draws = Draws(generator.randrange(2**30))
            draft = task.draft(draws, 0.5 if task.has_depth(options) else None, options, REPEATED)
            yield from draft.text(20).split("\n")
