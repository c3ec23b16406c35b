"""A base, a tokenizer and text on disk; recipes for them."""

import copy
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_model
from hici.train.recipe import recipe_from_dict
from hici.train.run import train

TEXT = "the a cat dog river mountain runs sees under over quickly slowly and then while blue old house tree sings"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def base(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    model = tiny_model(tie_word_embeddings=True, max_position_embeddings=32, vocab_size=len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """20 documents in which every word follows from the one before: learnable at once."""
    directory = tmp_path_factory.mktemp("text")
    for i in range(20):
        words = [WORDS[(i + 3 * j) % len(WORDS)] for j in range(200 + i)]
        (directory / f"{i:02}.txt").write_text(" ".join(words))
    return directory


@pytest.fixture(scope="session")
def common_values(base, text):
    """A recipe's values but its output_dir: 64 tokens (twice the base's positions), segments of 16, past."""
    return {
        "model": str(base),
        "data": [str(text)],
        "context_length": 64,
        "hici": {"num_local_slots": 3, "num_global_slots": 2, "num_heads": 4, "bottleneck_dim": 32,
                 "compress_dim": 16, "segment_size": 16, "visibility": "past"},
        "max_steps": 12,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "hici_learning_rate": 5e-3,
        "warmup_steps": 2,
        "heldout_fraction": 0.2,
        "heldout_windows": 3,
        "dtype": "float32",
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def values(common_values, tmp_path):
    """A recipe's values."""
    return {**copy.deepcopy(common_values), "output_dir": str(tmp_path / "run")}


STEPS = 8  # of whole_run


@pytest.fixture
def no_picture(monkeypatch):
    """No train.png of runs in this process: a quarter of their time."""
    monkeypatch.setattr("hici.train.run.plot_training", lambda steps, target: target)


@pytest.fixture(scope="session")
def random_values(common_values):
    """Dropout, drawn segment counts and accumulation: all that a resumed run can get wrong."""
    hici = {key: value for key, value in common_values["hici"].items() if key != "segment_size"}
    return {**common_values, "hici": hici, "lora_dropout": 0.1, "segment_counts": [2, 4], "save_steps": 2,
            "keep_checkpoints": 9, "heldout_windows": 1, "max_steps": STEPS}  # fmt: skip


@pytest.fixture(scope="session")
def whole_run(random_values, tmp_path_factory):
    """The uninterrupted run, with all of its checkpoints."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_from_dict({**random_values, "output_dir": str(output)}), progress=False)
    return output


@pytest.fixture
def recipe(random_values, tmp_path):
    def make(**changes):
        return recipe_from_dict({**random_values, "output_dir": str(tmp_path / "run"), **changes})

    return make


@pytest.fixture
def stopped(whole_run, tmp_path):
    """tmp_path/run as a run leaves it that was killed after a step's checkpoint."""

    def make(step):
        for path in (whole_run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) <= step:
                shutil.copytree(path, tmp_path / "run" / "checkpoints" / path.name)
        if step:  # the log has gone on past the checkpoint
            shutil.copy(whole_run / "metrics.jsonl", tmp_path / "run")
        return tmp_path / "run"

    return make
