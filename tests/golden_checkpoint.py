"""The golden checkpoint in the released format, and what loading it must give. Nothing here is a test."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from helpers import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint"
TOLERANCE = 5e-5
VARIANTS = ("peft_fp32", "peft_bf16_adapter", "peft_bf16")
# published mode -> (visibility, use_global, use_local)
MODES = {
    "none": ("all", True, True),
    "causal_gi": ("current", True, True),
    "causal_gi_gonly": ("current", True, False),
    "causal_shift": ("past", True, True),
    "causal_shift_g": ("past", True, False),
}
CASES = tuple(json.loads((CHECKPOINT / "golden.json").read_text())["cases"])
EXPECTED = load_file(CHECKPOINT / "golden.safetensors")
IDS = EXPECTED["input_ids"]
# what no file of the released format holds
NEEDED = {"base_model": str(CHECKPOINT / "base"), "context_length": 64, "config": {"num_heads": 4}}
