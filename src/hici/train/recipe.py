"""A training recipe: YAML plus overrides, every key typed, an unknown key an error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hici.config import HiCIConfig
from hici.models.lookup import FULL, HICI, S2
from hici.registry import suggest

ATTENTIONS = (HICI, S2, FULL)
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear"}  # the Trainer's names
CHOICES = {
    "method": ATTENTIONS,
    "rope": ("auto", "linear", "yarn", "none"),
    "data_format": ("text", "instruction"),
    "packing": ("packed", "document"),
    "overlong": ("skip", "shorten", "error"),
    "dtype": ("bfloat16", "float32"),
    "quantization": ("none", "8bit", "4bit"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "schedule": tuple(SCHEDULES),
    "device": ("auto", "cuda", "cpu"),
}
AT_LEAST_ONE = (
    "max_steps", "batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha", "logging_steps",
    "keep_checkpoints", "data_workers", "max_documents", "mlp_tile",
)  # fmt: skip
AT_LEAST_ZERO = (
    "seed",
    "heldout_windows",
    "warmup_steps",
    "learning_rate",
    "hici_learning_rate",
    "weight_decay",
    "save_steps",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that `hici train` needs; defaults are the published hyperparameters where there are any.

    Attributes:
        model: name or path of the base.
        data: text files, globs, folders, .jsonl, .json, .parquet, token .bin or hub:org/name (docs/data.md).
        output_dir: gets adapter/, checkpoints/, metrics.jsonl, train.json and train.png.
        context_length: tokens in a sequence; rope grows by `rope` where the base represents fewer.
        method: attention trained in: "hici", or the baselines "hici_s2" (LongLoRA's) and "full", both LoRA without HiCI
            modules.
        hici: fields of HiCIConfig.
        segment_counts: numbers of segments, one drawn by the seed for each optimizer step (methods "hici" and
            "hici_s2"); None: always those of `hici`.
        rope: "auto" (linear, or the kind by which the base is scaled already), "linear", "yarn", or "none" (a longer
            context is then an error).
        data_format: "text", or "instruction" (loss on the answers only).
        text_key: the text's column (.jsonl, .parquet, hub data sets).
        packing: "packed" (documents in a row, EOS between them, cut into whole sequences) or "document" (each one a
            sequence of its own).
        prompt: instruction data: how a sample becomes text (`hici.data.prompts`); "auto": by its columns.
        overlong: instruction samples longer than the context: "skip" (counted and reported), "shorten" (the prompt, in
            its middle; never the answer) or "error".
        hub_split, hub_config: of data sets of the hub (`hub:org/name` in `data`).
        streaming: read hub data sets without downloading them whole; needs `max_documents`.
        max_documents: read no more documents than these of each source; None: all.
        token_cache: where tokenised data lies; None: the user's cache directory.
        data_workers: processes that tokenise.
        heldout_data: held-out files; None: about `heldout_fraction` of the data, whole documents.
        heldout_windows: held-out sequences measured, before and after, in "hici" and in "full" attention.
        lora_r, lora_alpha, lora_dropout, train_embeddings, train_norms: as `hici.add_lora`.
        max_steps, batch_size, gradient_accumulation_steps: optimizer steps; sequences a device; steps added up.
        learning_rate, hici_learning_rate: of LoRA, embeddings and norms; of the HiCI modules.
        max_grad_norm, hici_max_grad_norm: gradient clips of the same two groups.
        warmup_steps: linear warm-up of the learning rates.
        schedule: what follows: "constant" (as published), or "linear", down to 0 at the last step.
        weight_decay, adam_beta1, adam_beta2: AdamW's.
        dtype: of the frozen base. "bfloat16" trains under autocast, with trained parameters in float32.
        quantization: of the frozen base: "none", "8bit" or "4bit" (bitsandbytes; QLoRA).
        optimizer: "adamw", "adamw_8bit" or "paged_adamw_8bit" (bitsandbytes).
        gradient_checkpointing: recompute each layer in the backward pass.
        offload_checkpoints: keep what is recomputed from in the CPU's memory (CUDA only).
        mlp_tile: tokens that go through an MLP at a time; None: all at once.
        save_steps: optimizer steps between two checkpoints; 0: none.
        keep_checkpoints: whole checkpoints that stay.
        logging_steps: steps between two lines on the screen (metrics.jsonl has every step).
        tensorboard: write TensorBoard files as well.
        device: "auto" (a GPU where there is one), "cuda" or "cpu".
        seed: of initial values, data order and dropout.
        overwrite: replace existing results.
    """

    model: str
    data: list[str]
    output_dir: str
    context_length: int
    method: str = "hici"
    hici: dict[str, Any] = dataclasses.field(default_factory=dict)
    segment_counts: list[int] | None = None
    rope: str = "auto"
    data_format: str = "text"
    text_key: str = "text"
    packing: str = "packed"
    prompt: str = "auto"
    overlong: str = "skip"
    hub_split: str = "train"
    hub_config: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    token_cache: str | None = None
    data_workers: int = 1
    heldout_data: list[str] | None = None
    heldout_fraction: float = 0.02
    heldout_windows: int = 8
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    train_embeddings: bool = True
    train_norms: bool = True
    max_steps: int = 1000
    batch_size: int = 1
    gradient_accumulation_steps: int = 8
    learning_rate: float = 2e-5
    hici_learning_rate: float = 2e-4
    max_grad_norm: float = 1.0
    hici_max_grad_norm: float = 0.3
    warmup_steps: int = 20
    schedule: str = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    dtype: str = "bfloat16"
    quantization: str = "none"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    offload_checkpoints: bool = False
    mlp_tile: int | None = None
    save_steps: int = 100
    keep_checkpoints: int = 2
    logging_steps: int = 1
    tensorboard: bool = False
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_minimum("context_length", self.context_length, 2)  # one token to read, one to predict
        for name in AT_LEAST_ONE:
            if getattr(self, name) is not None:
                _check_minimum(name, getattr(self, name), 1)
        for name in AT_LEAST_ZERO:
            _check_minimum(name, getattr(self, name), 0)
        for name in ("lora_dropout", "adam_beta1", "adam_beta2", "heldout_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1); give such a number")
        for name in ("max_grad_norm", "hici_max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} would stop all learning; give a number > 0 (inf: none)")
        self._check_combinations()
        self.hici_config()

    def _check_combinations(self) -> None:
        """Keys that need or exclude one another."""
        if self.segment_counts is not None:
            if self.method == FULL:
                raise ValueError("segment_counts with method='full', which has no segments; take one of them out")
            if not self.segment_counts or min(self.segment_counts) < 1:
                raise ValueError(
                    f"segment_counts={self.segment_counts} is no list of numbers >= 1; give some, as [2, 4]"
                )
            if self.hici.get("segment_size") is not None:
                raise ValueError(
                    "segment_counts and hici.segment_size are both given, but each decides the segments; take one out"
                )
        if self.streaming and self.max_documents is None:
            raise ValueError("streaming without max_documents would read without end; give max_documents")
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError(
                "offload_checkpoints=true needs gradient_checkpointing, whose checkpoints it moves; turn it on"
            )

    def hici_config(self) -> HiCIConfig:
        """The HiCIConfig of the recipe's `hici` section."""
        return HiCIConfig.from_dict(self.hici)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML or JSON (which knows no infinity: a clip of inf is "inf")."""
        return {key: "inf" if value == math.inf else value for key, value in dataclasses.asdict(self).items()}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides such as `["--max_steps", "20", "--hici.visibility", "past"]`.

    Raises:
        ValueError: a missing file, bad YAML, an unknown key (with the nearest known one), a value of another type, a
            required key that is missing.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist; give a YAML file, for example one of recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ValueError(f"recipe {path} is not valid YAML ({_one_line(error)}); correct it") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} holds {type(values).__name__}, but a recipe is keys and values")
    return recipe_from_dict(apply_overrides(values, overrides))


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """A checked recipe. Raises ValueError as `load_recipe`."""
    kinds = typing.get_type_hints(Recipe)
    for key in values:
        if key not in kinds:
            raise ValueError(suggest(str(key), kinds, "recipe key"))
    required = [f.name for f in dataclasses.fields(Recipe) if _is_required(f)]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"the recipe lacks {', '.join(missing)}; add it to the file or give --{missing[0]} VALUE")
    return Recipe(**{key: _convert(key, value, kinds[key]) for key, value in values.items()})


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values with `--key value` or `--key=value` applied; dots reach into sections, values are YAML."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not an override; write --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{key} has no value; write --{key} VALUE")
            text = words.pop(0)
        section, _, name = key.replace("-", "_").rpartition(".")
        target = result.setdefault(section, {}) if section else result
        if not isinstance(target, dict):
            raise ValueError(f"--{key}: {section!r} is not a section of the recipe; known sections: hici")
        try:
            target[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            raise ValueError(f"--{key} {text} is not valid YAML ({_one_line(error)}); quote the value") from error
    return result


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, or ValueError. YAML reads 2e-5 as a string and 1 as an int: both are good floats."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    origin = typing.get_origin(kind) or kind
    try:
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if origin is list and isinstance(value, (str, int, list)):
            items = value if isinstance(value, list) else [value]
            return (
                [_convert(key, item, int) for item in items]
                if typing.get_args(kind) == (int,)
                else [str(item) for item in items]
            )
    except ValueError:
        pass
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ValueError(f"recipe key {key}={value!r} is {type(value).__name__}, but {origin.__name__} is needed")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(suggest(value, choices, name))


def _check_minimum(name: str, value: float, minimum: float) -> None:
    if not minimum <= value < math.inf:
        raise ValueError(f"{name}={value} is no finite number >= {minimum}; give one")
