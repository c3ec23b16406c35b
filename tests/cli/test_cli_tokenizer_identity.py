"""Another tokenizer or chat template is another measurement: an earlier result or half of one is not taken over."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from tokenizers.processors import TemplateProcessing

from hici.data.encoder import tokenizer_fingerprint


@pytest.mark.parametrize("task", ["passkey", "lines"])
def test_a_changed_chat_template_is_told(hici_command, base_directory, tmp_path, task):
    model = tmp_path / "model"
    shutil.copytree(base_directory, model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps(config))
    command = ("eval", "retrieval", model, "--tasks", task, "--lengths", 1024, "--samples", 1, "--chat", "--out",
               tmp_path / "out")  # fmt: skip
    done = hici_command(*command)
    assert done.status == 0, done.err
    assert "holds this very measurement already" in hici_command(*command).err
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant]", "helper]"))
    done = hici_command(*command)
    assert done.status == 2
    assert "is of another measurement: its model.tokenizer_fingerprint is" in done.err


def test_fingerprint(tokenizer):
    """What changes tokens changes it; what a call leaves behind does not."""
    found, other = tokenizer_fingerprint(tokenizer), copy.deepcopy(tokenizer)
    other(["a cat", "a dog sings"], padding=False, truncation=True, max_length=2)
    assert tokenizer_fingerprint(other) == found
    other.chat_template = other.chat_template + " "
    assert tokenizer_fingerprint(other) != found
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    assert tokenizer_fingerprint(other) != found
