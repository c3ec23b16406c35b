"""Qwen3: tokens get q_norm and k_norm, slots do not (they enter behind them). The two norms train with the others.

Its published code does not round the rope factor up.
"""

from hici.models.architectures.base import Architecture

_LLAMA_NORMS = Architecture(()).norms

ARCHITECTURE = Architecture(model_types=("qwen3",), norms=(*_LLAMA_NORMS, "q_norm", "k_norm"), whole_rope_factor=False)
