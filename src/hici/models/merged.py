"""Merged models that keep their HiCI modules: one class over each stock causal LM, for AutoModel's remote code and us.

`hici merge --as hici` writes a standard directory whose config.json has the HiCIConfig in `hici`, and in `auto_map` a
small file that derives a class from `HiCIMixin`. `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`
then builds the model with its modules, in the attention mode that was saved, wherever hici is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from hici.config import HiCIConfig
from hici.models.attach import attach, attention_modules, reconfigure, saved_config, write_config
from hici.models.load import first_line
from hici.models.modes import ATTENTIONS, set_attention

REMOTE_FILE = "modeling_hici.py"
# `transformers serve` asks AutoModelForDecision for any model (a causal LM decides by the logits of the options) and
# then takes the stock class by its name, without a look at the remote code of AutoModelForCausalLM
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForDecision")

_REMOTE_CODE = '''\
"""Builds this model with its HiCI modules; needs the package hici (pip install hici)."""

import transformers

from hici.models.merged import HiCIMixin


class {name}(HiCIMixin, transformers.{name}):
    """With HiCI attention, in the attention mode that config.json names."""
'''


class HiCIMixin:
    """In front of a causal LM of transformers: its constructor attaches the modules that `config.hici` describes.

    The class has the name of the one behind it, which transformers and engines know.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        hici, mode, asked = saved_config(config), saved_attention(config), config._attn_implementation
        if hici is None:
            raise ValueError(f"{type(self).__name__} needs a config with a HiCIConfig in `hici`, but it has none; "
                             "give the config.json of a merged HiCI model")  # fmt: skip
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg] # of the causal LM behind
        attach(self, hici)
        for attention in attention_modules(self):
            _make_gate_scalar(attention.global_integrator)
        if asked is None:
            set_attention(self, mode)
        else:
            self.set_attn_implementation(asked)  # type: ignore[attr-defined] # of the causal LM behind
            write_config(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but no weight stays random.

        Raises:
            ValueError: weights are missing, left over or of another shape.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc] # as below
        problems = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if problems:
            raise ValueError(f"{model.config.name_or_path} lacks or misshapes {len(problems)} tensors "
                             f"({', '.join(sorted(problems)[:4])}); copy the weights again")  # fmt: skip
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; config.json gets the attention mode that the model is in."""
        write_config(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc] # of the causal LM behind


def _make_gate_scalar(integrator: Any) -> None:
    """transformers compares the shapes of files and parameters without load_state_dict's hooks: [], as published."""
    gate = integrator.expand_scale_param
    integrator.expand_scale_param = nn.Parameter(gate.detach().reshape(()), requires_grad=gate.requires_grad)


def saved_attention(model_config: Any) -> str:
    """The attention mode in a transformers config (`config.hici["attention"]`); "full" where there is none."""
    values = getattr(model_config, "hici", None) or {}
    mode = values.get("attention", "full")
    if mode not in ATTENTIONS:
        raise ValueError(
            f"config.json: hici.attention={mode!r} is none of {', '.join(ATTENTIONS)}; copy the file again"
        )
    return mode


def remote_code(name: str) -> str:
    """The file that a merged directory carries, for a class of transformers."""
    return _REMOTE_CODE.format(name=name)


def merged_class(model_config: Any) -> type:
    """The merged class for a transformers config: what the remote code defines."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    parent = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    return type(parent.__name__, (HiCIMixin, parent), {"__module__": __name__})


def is_merged_directory(directory: str | Path) -> bool:
    """Whether `hici merge --as hici` wrote it: a model directory whose config.json has a HiCIConfig."""
    file = Path(directory).expanduser() / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "hici" in values


def load_merged(
    directory: str | Path,
    attention: str | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
    dtype: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> Any:
    """A merged HiCI model in eval mode, without remote code.

    Args:
        attention: "full" or "hici"; None: as saved.
        config: changes to the use of the modules (segments, visibility, ...).
        dtype, device_map, quantization_config: as in transformers.

    Raises:
        ValueError: weights are missing, left over or of another shape; a config that needs other modules.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        model_config = AutoConfig.from_pretrained(directory)
        saved = saved_attention(model_config)
        model = merged_class(model_config).from_pretrained(  # type: ignore[attr-defined] # of the mixin
            directory, config=model_config, dtype=dtype or "auto", device_map=device_map, **options
        )
    except (OSError, ImportError) as error:
        raise ValueError(
            f"the merged model {directory} could not be loaded ({first_line(error)}); copy it again"
        ) from error
    if config is not None:
        changes = config.to_dict() if isinstance(config, HiCIConfig) else config
        reconfigure(model, **changes)
    set_attention(model, attention or saved)
    return model.requires_grad_(False).eval()
