"""Merged models that keep their HiCI modules: one class over each stock causal LM, for AutoModel's remote code and us.

`hici merge --as hici` writes a standard directory whose config.json has the HiCIConfig in `hici`, and in `auto_map` a
small file that derives a class from `HiCIMixin`. `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`
then builds the model with its modules, in the attention mode that was saved, wherever hici is installed.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hici.config import HiCIConfig, given_fields
from hici.files import write_text
from hici.models.architectures.base import HICI_MODULES
from hici.models.attach import attach, reconfigure, remember_base, saved_config, write_config
from hici.models.load import read_errors
from hici.models.lookup import attention_modules, is_attached
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
        # transformers compares the shapes of files and parameters without load_state_dict's hooks
        _reshape_gates(self, ())
        if asked is None:
            set_attention(self, mode)
        else:
            self.set_attn_implementation(asked)  # type: ignore[attr-defined] # of the causal LM behind
            write_config(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but no weight stays random, and a quantised model keeps its modules whole.

        Raises:
            ValueError: weights are missing, left over or of another shape.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_modules(kwargs["quantization_config"])
        model, info = super().from_pretrained(  # type: ignore[misc] # of the causal LM behind
            *args, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True}
        )
        problems = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if problems:
            raise ValueError(f"{model.config.name_or_path} lacks or misshapes {len(problems)} tensors "
                             f"({', '.join(sorted(problems)[:4])}); copy the weights again")  # fmt: skip
        _reshape_gates(model, (1,))  # as everywhere else: FSDP2 shards dimension 0
        remember_base(model)  # the constructor saw no weights
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; config.json gets the attention mode that the model is in, and the code comes with it.

        After `hici.detach` it is a plain model, and saved as one.
        """
        attached = is_attached(self)
        if attached:
            write_config(self)
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc] # as above
        if kwargs.get("is_main_process", True):
            file = Path(save_directory) / REMOTE_FILE
            if attached:
                write_text(file, remote_code(type(self).__name__))
            else:  # transformers has put it there, and into config.json, for a class of remote code
                file.unlink(missing_ok=True)
                config: Any = copy.deepcopy(self.config)  # type: ignore[attr-defined] # of the causal LM behind
                vars(config).pop("auto_map", None)
                config.save_pretrained(save_directory)
        return saved


def _reshape_gates(model: Any, shape: tuple[int, ...]) -> None:
    for attention in attention_modules(model):
        gate = attention.global_integrator.expand_scale_param
        attention.global_integrator.expand_scale_param = nn.Parameter(
            gate.detach().reshape(shape), requires_grad=gate.requires_grad
        )


def _sparing_modules(quantization_config: Any) -> Any:
    """A bitsandbytes config that leaves the HiCI modules (and, as by default, the output layer) as they are."""
    if getattr(quantization_config, "llm_int8_skip_modules", ()) is not None:
        return quantization_config  # the caller decides, or the library has no such setting
    sparing = copy.deepcopy(quantization_config)
    sparing.llm_int8_skip_modules = [*(rf".*\.{name}\..*" for name in HICI_MODULES), "lm_head"]
    return sparing


def saved_attention(model_config: Any) -> str:
    """The attention mode in a transformers config (`config.hici["attention"]`); "full" where there is none."""
    mode = getattr(model_config, "hici", {}).get("attention", "full") if saved_config(model_config) else "full"
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
    if type(model_config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"config.json has a HiCIConfig, but {model_config.model_type} is no causal language model; "
                         "copy the file again")  # fmt: skip
    return _merged_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)].__name__)


@functools.cache
def _merged_class(name: str) -> type:
    return type(name, (HiCIMixin, getattr(transformers, name)), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """A merged class by its name: pickles of a merged model look for it here."""
    if name.endswith("ForCausalLM") and hasattr(transformers, name):
        return _merged_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        ValueError: weights are missing, left over, damaged or of another shape; a config that needs other modules.
    """
    options: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    with read_errors(directory):
        model_config = transformers.AutoConfig.from_pretrained(directory)
        saved = saved_attention(model_config)
        model = merged_class(model_config).from_pretrained(  # type: ignore[attr-defined] # of the mixin
            directory, config=model_config, dtype=dtype or "auto", device_map=device_map, **options
        )
    changes = given_fields(config)
    if changes:
        reconfigure(model, **changes)
    set_attention(model, attention or saved)
    return model.requires_grad_(False).eval()
