"""Long texts have the tokens of the whole text, in bounded stretches; what is written in a text is text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hici.data import stretches
from hici.data.encoder import Encoder
from hici.data.sources import read_text

TEXT = "In the midst of the  river, he said:\n\n\tit is «long» 🐟 and 12,000 feet wide; isn't it? " * 40
WORDS = st.lists(st.sampled_from(["a", "ab", "the", " the", "  ", "\n", "\n\n", "é", "🐟", "'s", "</s>", "x" * 70]))


def wrapped(core, model_trainer):
    core.train_from_iterator([TEXT, "aaaa aaaa"], model_trainer)
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return wrapped(core, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))


def sentence_piece():
    """▁ in front of each text, and words that are not split before the merges."""
    core = Tokenizer(models.BPE(unk_token="?", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return wrapped(core, trainers.BpeTrainer(vocab_size=120, special_tokens=["?"], show_progress=False))


TOKENIZERS = {"bytes": byte_level(), "pieces": sentence_piece()}


@pytest.fixture
def calls(monkeypatch):
    """Letters of every stretch, which are small here."""
    sizes = []
    plain = stretches._tokens
    for name, value in (("_STRETCH", 300), ("_OVERLAP", 120), ("_EQUAL", 4)):
        monkeypatch.setattr(stretches, name, value)
    monkeypatch.setattr(
        stretches, "_tokens", lambda text, a, b, t: sizes.append(len(text[a:b])) or plain(text, a, b, t)
    )
    return sizes


def whole(text, tokenizer):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_text_is_tokenised_in_stretches(name, calls):
    tokenizer, told = TOKENIZERS[name], []
    (encoded,), (short,) = Encoder(tokenizer).encode([("x", TEXT), ("y", "short")], told.append)
    assert encoded.ids.tolist() == whole(TEXT, tokenizer)
    assert short.ids.tolist() == whole("short", tokenizer)
    assert max(calls) == 300  # none grew
    assert len(calls) == -(-(len(TEXT) - 120) // 180)
    assert sum(told) == len(TEXT) + 5
    assert max(told) <= 300


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=WORDS.flatmap(lambda words: st.integers(1, 60).map(lambda times: words * times)))
def test_any_text_has_the_tokens_of_the_whole(name, words):
    text, tokenizer = "".join(words), TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch:
        for attribute, value in (("_STRETCH", 300), ("_OVERLAP", 200), ("_EQUAL", 4)):
            patch.setattr(stretches, attribute, value)
        told = []
        found = stretches.long_text_ids(text, tokenizer, told.append)
    assert found.tolist() == whole(text, tokenizer)
    assert sum(told) == len(text)


@pytest.mark.parametrize("letters", [301, 400, 1001])
def test_where_no_seam_is_found_the_stretch_grows(letters, calls):
    """Pairs of a letter: those of two stretches may be other pairs. The overlap here begins at an odd letter."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    stretches._OVERLAP = 121  # the fixture sets it back
    found = stretches.long_text_ids("a" * letters, tokenizer, lambda done: None)
    assert found.tolist() == [1] * (letters // 2) + [0] * (letters % 2)
    assert max(calls) > 300


def test_what_looks_like_a_special_token_in_a_text_is_text(tokenizer):
    text = "a</s>b<|im_end|>"
    ((encoded,),) = Encoder(tokenizer).encode([("x", text)])
    assert encoded.ids.tolist() == [tokenizer.convert_tokens_to_ids(letter) for letter in text]
    assert tokenizer(text, add_special_tokens=False)["input_ids"][1] == tokenizer.eos_token_id  # of others' calls


def test_a_book_has_the_tokens_of_the_whole(shared, calls):
    book = read_text(min((shared / "books").glob("*.txt"), key=lambda path: path.stat().st_size))
    tokenizer = TOKENIZERS["bytes"]
    found = stretches.long_text_ids(book, tokenizer, lambda letters: None)
    assert found.tolist() == whole(book, tokenizer)
    assert max(calls) == 300
