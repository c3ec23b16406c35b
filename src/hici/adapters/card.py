"""The README.md of a directory: what it is, how it was made, how to use it, under which licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hici.adapters.record import Record

_USE_ADAPTER = """\
```python
import hici

model = hici.from_pretrained("{name}", attention="full")  # or attention="hici"
```

`adapter_config.json` and `adapter_model.safetensors` are plain PEFT (LoRA, embeddings, norms) and give the
full-attention model without hici; set the base's rope first: `{rope_parameters}`,
`max_position_embeddings={max_position_embeddings}`. `hici_model.safetensors` holds the HiCI modules,
`hici_config.json` everything else. A base in bfloat16 rounds what was trained in float32 (`dtype=torch.float32` in
`from_pretrained` keeps it).
"""

_USE_RELEASED = """\
```python
import hici

model = hici.from_pretrained("{name}", attention="full")  # or attention="hici"
```

The released HiCI format: `adapter_model.bin` (LoRA) and `trainable_params.bin` (HiCI modules, embeddings, norms), with
`hici_config.json` for what they do not say (context, rope, heads).
"""

_USE_PLAIN = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```

A standard model for any engine, in full attention and without HiCI modules: LoRA, embeddings and norms are folded in,
rope and vocabulary are set.
"""

_USE_MERGED = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", trust_remote_code=True)  # needs: pip install hici
model.set_attn_implementation("sdpa")  # full attention; back with "hici"
```

LoRA, embeddings and norms are folded in, the HiCI modules are kept. It starts in attention mode `{attention}`.
Without `trust_remote_code` transformers loads the full-attention model and reports the modules as unexpected.
"""

_VISIBILITY = """\
Visibility `all` and `current` let a token see a summary of its own future: a perplexity measured in attention mode
`hici` with one of these is no language-model perplexity. `past` is causal.
"""


def adapter_card(record: Record, name: str) -> str:
    """Markdown for an adapter directory, of either layout."""
    use = _USE_ADAPTER if record.layout == "hici" else _USE_RELEASED
    values = record.to_dict()
    text = (f"A HiCI adapter for `{record.base_model}` ({record.base_model_type}), saved in attention mode "
            f"`{record.attention}`.")  # fmt: skip
    return _card(name, record.base_model, ["hici", "long-context", "lora"], text, use.format(name=name, **values),
                 record.hici, record.context_length, record.rope_parameters, record.training)  # fmt: skip


def merged_card(
    name: str,
    kind: str,
    base_model: str,
    hici: dict[str, Any] | None,
    context_length: int,
    rope_parameters: dict[str, Any],
    attention: str,
    training: dict[str, Any] | None,
) -> str:
    """Markdown for a merged directory. `kind`: "plain" or "hici"; `hici`: fields of HiCIConfig, or None."""
    use = (_USE_PLAIN if kind == "plain" else _USE_MERGED).format(name=name, attention=attention)
    tags = ["long-context"] if kind == "plain" else ["hici", "long-context", "custom_code"]
    method = "LongLoRA" if hici is None else "HiCI"
    text = f"`{base_model}`, adapted to {context_length:,} tokens with {method} and merged."
    shown = hici if kind == "hici" else None
    return _card(name, base_model, tags, text, use, shown, context_length, rope_parameters, training)


def base_licence(base_model: str) -> str | None:
    """The licence in the front matter of the base's own README.md, where that is on this machine."""
    for file in _readmes(base_model):
        front = front_matter(file)
        if isinstance(front.get("license"), str):
            return front["license"]
    return None


def front_matter(file: Path) -> dict[str, Any]:
    """The YAML block at the top of a README; {} without one."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        values = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _readmes(base_model: str) -> list[Path]:
    if not base_model:
        return []
    if Path(base_model).is_dir():
        return [Path(base_model) / "README.md"]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base_model, "README.md")
    except HFValidationError:
        return []
    return [Path(cached)] if isinstance(cached, str) else []


def _card(
    name: str,
    base_model: str,
    tags: list[str],
    text: str,
    use: str,
    hici: dict[str, Any] | None,
    context_length: int,
    rope_parameters: dict[str, Any],
    training: dict[str, Any] | None,
) -> str:
    licence = base_licence(base_model)
    on_hub = bool(base_model) and not Path(base_model).is_absolute()
    front: dict[str, Any] = {"library_name": "hici" if hici is not None else "transformers", "tags": tags}
    front |= {"base_model": base_model} if on_hub else {}
    front |= {"license": licence} if licence else {}
    facts = [("base model", f"`{base_model}`"), ("context", f"{context_length:,} tokens"),
             ("rope", f"`{json.dumps(rope_parameters)}`")]  # fmt: skip
    if hici is not None:
        facts.append(("visibility", f"`{hici['visibility']}`"))
        facts += [(key, f"`{value}`") for key, value in hici.items() if key != "visibility" and value is not None]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts)
    sections = [f"# {name}", text, f"| | |\n|---|---|\n{table}", "## Use", use.strip()]
    if hici is not None:
        sections.append(_VISIBILITY.strip())
    if training:
        rows = "\n".join(f"| {key} | {value} |" for key, value in training.items())
        sections += ["## Training", f"| | |\n|---|---|\n{rows}"]
    said = f"The base model's licence, `{licence}`, holds for this too." if licence else (
        "The base model's licence holds for this too.")  # fmt: skip
    sections += ["## Licence", said]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"
