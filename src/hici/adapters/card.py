"""The README.md of an adapter directory."""

from __future__ import annotations

from typing import Any

_CARD = """\
---
library_name: hici
base_model: {base_model}
tags: [hici, long-context, lora]
---

# {name}

A HiCI adapter for `{base_model}` ({base_model_type}), saved in attention mode `{attention}` with visibility
`{visibility}` for {context_length:,} tokens.

```python
import hici

model = hici.from_pretrained("{name}", attention="full")  # or attention="hici"
```

`adapter_config.json` and `adapter_model.safetensors` are plain PEFT (LoRA, embeddings, norms) and give the
full-attention model without hici; set the base's rope first: `{rope_parameters}`,
`max_position_embeddings={max_position_embeddings}`. `hici_model.safetensors` holds the HiCI modules,
`hici_config.json` everything else. A base in bfloat16 rounds what was trained in float32 (`dtype=torch.float32` in
`from_pretrained` keeps it).

Visibility `all` and `current` let a token see a summary of its own future: a perplexity measured in attention mode
`hici` with one of these is no language-model perplexity. `past` is causal.
"""


def model_card(record: Any, name: str) -> str:
    """Markdown for a `hici.adapters.directory.Record`."""
    values = {field: getattr(record, field) for field in record.__dataclass_fields__}
    return _CARD.format(**values, name=name, visibility=record.hici["visibility"])
