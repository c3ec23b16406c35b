"""The code of the published model card in a fresh process, against the published implementation's logits."""

import json
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

# as in the card, but for the golden shapes, float32, and the context that the card cannot know
CARD = """
import torch
import transformers
from peft import PeftModel

import llama_attn_hici as hici_attn
hici_attn.CONTEXT_LENGTH = 64
hici_attn.MIXED_GROUP_TRAINING = False
hici_attn.replace_llama_attn(use_flash_attn=True, use_full=False, use_hierarchical_forward=True)
base_model = transformers.AutoModelForCausalLM.from_pretrained(BASE, torch_dtype=torch.float32, device_map="auto")
hici_attn.register_hici_to_model(base_model, SLOTS=8, global_slots=4, num_heads=4, bottleneck_dim=32,
                                 shared_compress_dim=16)
model = PeftModel.from_pretrained(base_model, ADAPTER)
tokenizer = transformers.AutoTokenizer.from_pretrained(ADAPTER)
"""
COMPARE = """
import json
from pathlib import Path
from safetensors.torch import load_file

golden, found = load_file(Path(BASE).parent / "golden.safetensors"), {}
for name in sorted(golden):
    variant, _, mode = name.removesuffix("/logits").partition("/")
    if variant != VARIANT:
        continue
    hici_attn.replace_llama_attn(use_flash_attn=False, use_full=mode == "full", use_hierarchical_forward=mode != "full")
    if mode != "full":
        hici_attn.CAUSAL_CONTEXT_MODE = mode
    with torch.no_grad():
        found[mode] = (model(golden["input_ids"]).logits - golden[name]).abs().max().item()
print("RESULT", json.dumps([found, len(tokenizer), model.config.rope_parameters["factor"]]))
"""


def run(code, **names):
    head = "import torch; torch.set_num_threads(1)\n" + "".join(f"{name} = {str(v)!r}\n" for name, v in names.items())
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "variant, slots, modes",
    [
        ("peft_fp32", "num_memory_slots", 6),
        ("peft_fp32", "num_local_slots", 6),
        ("peft_bf16_adapter", "num_memory_slots", 3),
        ("peft_bf16", "num_local_slots", 3),
    ],
)
def test_the_card_gives_the_published_logits(checkpoint, tmp_path, variant, slots, modes):
    adapter = tmp_path / "adapter"
    shutil.copytree(checkpoint / variant, adapter)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(98)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w97").save_pretrained(adapter)
    code = CARD.replace("SLOTS", slots) + COMPARE
    done = run(code, BASE=checkpoint / "base", ADAPTER=adapter, VARIANT=variant)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found, entries, factor = json.loads(line.removeprefix("RESULT "))
    assert len(found) == modes
    assert max(found.values()) <= 5e-5, found
    assert (entries, factor) == (98, 4.0)
    assert done.stderr.count("without flash-attn or a GPU") == 1


def test_only_the_drop_in_modules_wrap_peft(checkpoint):
    done = run(
        """
import peft, hici, hici.dropin.modules, hici.dropin.loading
stock = vars(peft.PeftModel)["from_pretrained"]
model = hici.from_pretrained(ADAPTER, BASE, 64, "hici", config={"num_heads": 4})
assert vars(peft.PeftModel)["from_pretrained"] is stock
import llama_attn_hici, qwen3_attn_hici
llama_attn_hici.replace_llama_attn()
from transformers import AutoModelForCausalLM
for _ in range(2):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    llama_attn_hici.register_hici_to_model(base, num_heads=4, bottleneck_dim=32)
wrapped = peft.PeftModel.from_pretrained.__func__
assert wrapped is not stock.__func__ and wrapped.__wrapped__ is stock.__func__
assert peft.PeftModelForCausalLM.from_pretrained.__func__ is wrapped
print("fine")
""",
        BASE=checkpoint / "base",
        ADAPTER=checkpoint / "peft_fp32",
    )
    assert "fine" in done.stdout


def test_a_nested_call_in_a_fresh_process(checkpoint):
    """Python looks PeftModel.from_pretrained up before it registers the base."""
    code = (
        "import torch, transformers; from peft import PeftModel; import llama_attn_hici as h\n"
        "h.CONTEXT_LENGTH = 64\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint / 'base')!r})\n"
        "shapes = dict(num_heads=4, bottleneck_dim=32, shared_compress_dim=16)\n"
        "model = PeftModel.from_pretrained(h.register_hici_to_model(base, **shapes), "
        f"{str(checkpoint / 'peft_fp32')!r})\n"
        "print(model.config.vocab_size, model.config.rope_parameters['factor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["98", "4.0"]
