"""Llama and what is built like it. Qwen2's biases are inside its k_proj and v_proj, so slots get them too."""

from hici.models.architectures.base import Architecture

ARCHITECTURE = Architecture(model_types=("llama", "mistral", "qwen2"))
