"""A tokenizer whose tokens are bytes, so that every decoded text is exact, and documents of given tokens."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hici.data.documents import table, token_file
from hici.data.prepare import DataOptions, prepare

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Builds one: `template` is its chat template; `bos` whether it puts <s> in front of a text by itself."""

    def make(template=None, bos=False):
        letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        core = Tokenizer(models.BPE(vocab=letters, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
        if bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat(make_tokenizer):
    return make_tokenizer(CHATML)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """`prepare` with a cache of the test's own and no held-out part, where nothing else is said."""

    def run(*sources, tokenizer=tokenizer, vocab_size=None, **options):
        options = {"length": 8, "token_cache": str(tmp_path / "cache"), "heldout_windows": 0, **options}
        return prepare(DataOptions([str(s) for s in sources], **options), tokenizer,
                       vocab_size=len(tokenizer) if vocab_size is None else vocab_size, progress=False)  # fmt: skip

    return run


@pytest.fixture
def write(tmp_path):
    """Writes records as .jsonl, .json or .parquet by the name's ending, anything else as it is; gives the path."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet") and isinstance(content, list):
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif isinstance(content, list):
            lines = [json.dumps(record) for record in content]
            path.write_text("\n".join(lines) if name.endswith(".jsonl") else "[" + ",".join(lines) + "]")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A table of documents of these tokens (below 59,999): they lie in a token file, each before a 59,999."""

    def make(*rows):
        path = tmp_path_factory.mktemp("documents") / "x.bin"
        stream = [token for row in rows for token in (*row, 59_999)]
        np.array(stream, dtype="<u2").tofile(path)
        return table([token_file(path, 60_000, 59_999)])

    return make
