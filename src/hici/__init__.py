"""HiCI attention for pretrained language models: the public names.

Names load on first use (PEP 562), so ``import hici`` and ``hici --help`` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hici._version import __version__

if TYPE_CHECKING:
    from hici.adapters.convert import convert
    from hici.adapters.load import from_pretrained
    from hici.adapters.lora import add_lora
    from hici.adapters.merge import merge
    from hici.adapters.push import push_to_hub
    from hici.adapters.save import save_pretrained
    from hici.adapters.verify import verify
    from hici.config import HiCIConfig
    from hici.models.attach import attach, detach, reconfigure
    from hici.models.cache import HiCICache
    from hici.models.prefill import prefill
    from hici.models.vocabulary import grow_vocabulary
    from hici.rope import extend_rope

_PUBLIC = {
    "HiCICache": "hici.models.cache",
    "HiCIConfig": "hici.config",
    "add_lora": "hici.adapters.lora",
    "attach": "hici.models.attach",
    "convert": "hici.adapters.convert",
    "detach": "hici.models.attach",
    "extend_rope": "hici.rope",
    "from_pretrained": "hici.adapters.load",
    "grow_vocabulary": "hici.models.vocabulary",
    "merge": "hici.adapters.merge",
    "prefill": "hici.models.prefill",
    "push_to_hub": "hici.adapters.push",
    "reconfigure": "hici.models.attach",
    "save_pretrained": "hici.adapters.save",
    "verify": "hici.adapters.verify",
}

__all__ = [
    "HiCICache",
    "HiCIConfig",
    "__version__",
    "add_lora",
    "attach",
    "convert",
    "detach",
    "extend_rope",
    "from_pretrained",
    "grow_vocabulary",
    "merge",
    "prefill",
    "push_to_hub",
    "reconfigure",
    "save_pretrained",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hici' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
