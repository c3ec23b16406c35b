"""What was trained, whichever files hold it: our directory, the released one, LongLoRA's.

    hici                                              released, LongLoRA
    adapter_model.safetensors  LoRA, embeddings, ...  adapter_model.bin (or .safetensors)  LoRA
    hici_model.safetensors     HiCI modules           trainable_params.bin                 HiCI modules, the rest
    hici_config.json           all else               (nothing)

Tensors go by their name in the base model (`model.layers.0.self_attn.q_proj.lora_A.weight`); the prefix that PEFT
puts in front is taken off at reading and put back at writing.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hici.adapters import file_names
from hici.adapters.file_names import (
    HICI_FILE,
    LORA_CONFIG_FILE,
    LORA_FILE,
    PICKLED_LORA_FILE,
    RECORD_FILE,
    TRAINABLE_FILE,
)
from hici.adapters.record import Record, read_record
from hici.adapters.weights import read_tensors, refuse_bad_values
from hici.config import HiCIConfig, given_fields
from hici.files import read_json
from hici.models.architectures.base import is_hici_name

logger = logging.getLogger(__name__)

Reader = Callable[[Path], dict[str, Tensor]]

PEFT_PREFIX = "base_model.model."
PUBLISHED_NUM_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that an adapter directory holds.

    Attributes:
        directory: where it was read.
        name: what the user called it (a hub name, or the directory), which may tell the context.
        layout: "hici" or "released".
        tensors: by name in the base model. LoRA ends in .lora_A.weight or .lora_B.weight.
        lora_config: adapter_config.json, or None without LoRA.
        record: hici_config.json, or None.
        lora_file: the file that holds the LoRA.
    """

    directory: Path
    name: str
    layout: str
    tensors: dict[str, Tensor]
    lora_config: dict[str, Any] | None
    record: Record | None
    lora_file: str = LORA_FILE

    @property
    def lora(self) -> dict[str, Tensor]:
        """LoRA's pairs, those inside the HiCI modules too."""
        return {name: tensor for name, tensor in self.tensors.items() if is_lora_name(name)}

    @property
    def hici(self) -> dict[str, Tensor]:
        """The HiCI modules' own weights."""
        return {name: tensor for name, tensor in self.tensors.items() if is_module_name(name)}

    @property
    def saved(self) -> dict[str, Tensor]:
        """The base's own weights that were trained whole: embeddings, norms."""
        taken = self.lora.keys() | self.hici.keys()
        return {name: tensor for name, tensor in self.tensors.items() if name not in taken}

    @property
    def has_hici(self) -> bool:
        """Whether there are HiCI modules in it (LongLoRA's directories have none)."""
        return any(is_hici_name(name) for name in self.tensors)

    def file_of(self, name: str) -> Path:
        """The file in which a tensor of that name belongs."""
        if is_lora_name(name):
            return self.directory / self.lora_file
        if self.layout == "released":
            return self.directory / TRAINABLE_FILE
        return self.directory / (HICI_FILE if is_hici_name(name) else LORA_FILE)


def is_lora_name(name: str) -> bool:
    """Whether a name is a LoRA tensor's."""
    return ".lora_" in name


def is_module_name(name: str) -> bool:
    """Whether a name is a HiCI module's own weight, and no LoRA on it."""
    return is_hici_name(name) and not is_lora_name(name)


def is_adapter_directory(directory: Path) -> bool:
    """Whether a directory holds an adapter of ours, a released one or LongLoRA's, possibly a damaged one."""
    return any((directory / name).is_file() for name in file_names.ALL)


def read_contents(directory: str | Path, name: str | None = None, *, data: bool = True) -> Contents:
    """Read an adapter directory whole; `data=False`: without the tensors' values (they are on the meta device).

    Raises:
        ValueError: a missing, damaged or foreign file; NaN or infinity; an unknown key in a config.
    """
    directory = Path(directory).expanduser()
    name = name or str(directory)
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())  # "." has a name too
    contents = _read(directory, name, partial(read_tensors, data=data))
    _refuse_strange_tensors(contents)
    if not data:
        return contents
    by_file: dict[Path, dict[str, Tensor]] = {}
    for key, tensor in contents.tensors.items():
        by_file.setdefault(contents.file_of(key), {})[key] = tensor
    for file, tensors in by_file.items():
        refuse_bad_values(tensors, str(file))
    return contents


def _read(directory: Path, name: str, read: Reader) -> Contents:
    if (directory / RECORD_FILE).is_file():
        record = read_record(directory)
        if record.layout == "released":
            return _read_released(directory, name, record, read)
        return _read_ours(directory, name, record, read)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds an adapter, or a hub name")
    if (directory / HICI_FILE).is_file():
        read_record(directory)  # raises: the file is missing
    return _read_released(directory, name, None, read)


def _read_ours(directory: Path, name: str, record: Record, read: Reader) -> Contents:
    needed = [HICI_FILE, *([LORA_CONFIG_FILE, LORA_FILE] if record.peft else [])]
    _need(directory, needed)
    others = [file for file in (PICKLED_LORA_FILE, TRAINABLE_FILE) if (directory / file).exists()]
    if others:
        raise ValueError(f"{directory} is in our layout by its {RECORD_FILE}, but holds {' and '.join(others)} of the "
                         "released one, which would be left out; take them away")  # fmt: skip
    present = [file for file in (LORA_CONFIG_FILE, LORA_FILE) if (directory / file).exists()]
    if present and not record.peft:
        raise ValueError(
            f"{directory / RECORD_FILE} says that the directory has no PEFT part, but {', '.join(present)} is there; "
            f"take it away, or copy {RECORD_FILE} again"
        )
    tensors = dict(read(directory / HICI_FILE))
    strange = [key for key in tensors if not is_module_name(key)]
    if strange:
        raise ValueError(f"{directory / HICI_FILE} holds tensors of no HiCI module, left over: "
                         f"{', '.join(strange[:4])}; copy the file again")  # fmt: skip
    config = None
    if record.peft:
        config = read_lora_config(directory / LORA_CONFIG_FILE)
        lora = _without_prefix(read(directory / LORA_FILE))
        strange = [key for key in lora if is_module_name(key)]
        if strange:
            raise ValueError(f"{directory / LORA_FILE} holds weights of HiCI modules, left over: "
                             f"{', '.join(strange[:4])}; these go into {HICI_FILE}: copy both files again")  # fmt: skip
        tensors |= lora
    return Contents(directory, name, "hici", tensors, config, record)


def _read_released(directory: Path, name: str, record: Record | None, read: Reader) -> Contents:
    if not (directory / TRAINABLE_FILE).is_file() and not (directory / LORA_CONFIG_FILE).is_file():
        raise ValueError(
            f"{directory} has neither {RECORD_FILE} (ours) nor {LORA_CONFIG_FILE} and {TRAINABLE_FILE} (released), so "
            "it holds no adapter; check the path"
        )
    files = [file for file in (PICKLED_LORA_FILE, LORA_FILE) if (directory / file).is_file()]
    _need(directory, [LORA_CONFIG_FILE, files[0] if files else PICKLED_LORA_FILE, TRAINABLE_FILE])
    config = read_lora_config(directory / LORA_CONFIG_FILE)
    lora = _without_prefix(read(directory / files[0]))
    for other in files[1:]:
        _refuse_two_versions(directory, lora, _without_prefix(read(directory / other)))
    trained = _without_prefix(read(directory / TRAINABLE_FILE))
    both = sorted(lora.keys() & trained.keys())
    if both:
        raise ValueError(f"{directory}: {files[0]} and {TRAINABLE_FILE} both hold {', '.join(both[:4])}; take one of "
                         "each away")  # fmt: skip
    return Contents(directory, name, "released", {**trained, **lora}, config, record, files[0])


def _refuse_strange_tensors(contents: Contents) -> None:
    """What no training writes: whole numbers, and LoRA that is no pair of matrices."""
    for name, tensor in contents.tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{contents.file_of(name)}: {name} holds {tensor.dtype} and no floating-point numbers; "
                             "copy the file again")  # fmt: skip
        if (
            name.endswith((".lora_A.weight", ".lora_B.weight", ".memory_slots", ".global_queries"))
            and tensor.dim() != 2
        ):
            raise ValueError(f"{contents.file_of(name)}: {name} has shape {list(tensor.shape)}, but it must be a "
                             "matrix; copy the file again")  # fmt: skip


def _need(directory: Path, files: list[str]) -> None:
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise ValueError(
            f"{directory} lacks {' and '.join(missing)}; half a checkpoint is not loaded: copy the file again"
        )


def _refuse_two_versions(directory: Path, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    if one.keys() != other.keys() or any(not _same(one[key], other[key]) for key in one):
        raise ValueError(
            f"{directory} has {PICKLED_LORA_FILE} and {LORA_FILE}, and they differ; take the wrong one away"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    # without data, the shapes
    return one.shape == other.shape if one.device.type == "meta" else torch.equal(one, other)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        twice = [name for name in plain if name in tensors and PEFT_PREFIX + name in tensors]
        raise ValueError(f"{', '.join(twice[:4])}: there with and without the prefix {PEFT_PREFIX}; take one of each "
                         "away")  # fmt: skip
    return plain


def read_lora_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, checked: PEFT itself ignores a key that it does not know, and a lost one gets a default.

    Raises:
        ValueError: not JSON; an unknown or lost key; another kind of adapter than LoRA.
    """
    from peft import LoraConfig

    from hici.registry import suggest

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} instead of keys and values; copy the file again")
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: {suggest(key, known, 'key')} (a newer PEFT may have written it: install that)")
    missing = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in values]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; copy the file again")
    if values["peft_type"] != "LORA":
        raise ValueError(f"{file}: peft_type {values['peft_type']!r}, but HiCI adapters are LoRA; give one of these")
    return values


def tokenizer_source(directory: Path, base_model: Any = None) -> str:
    """Where an adapter's tokenizer is: its own directory, else its base (the given one, or the recorded one).

    Raises:
        ValueError: neither is known.
    """
    if (directory / "tokenizer_config.json").is_file() or base_model is not None:
        return str(directory if (directory / "tokenizer_config.json").is_file() else base_model)
    if (directory / RECORD_FILE).is_file():
        recorded = read_record(directory).base_model
    else:
        recorded = read_lora_config(directory / LORA_CONFIG_FILE).get("base_model_name_or_path") or ""
    if not recorded:
        raise ValueError(f"{directory} holds no tokenizer and does not record its base, which would have one; put the "
                         "tokenizer's files there, or give the base")  # fmt: skip
    return str(recorded)


def config_of(contents: Contents, given: HiCIConfig | dict[str, Any] | None) -> HiCIConfig:
    """The HiCIConfig of an adapter: shapes from its tensors, the rest from its record, from `given`, or the defaults.

    A field that `given` leaves at HiCIConfig's default counts as not given (a dict gives just what it holds).

    Raises:
        ValueError: no HiCI modules, or a half of them; `given` asks for other shapes than the tensors have.
    """
    shapes = _module_shapes(contents)
    changes = given_fields(given)
    for field, value in shapes.items():
        if changes.setdefault(field, value) != value:
            raise ValueError(
                f"config: {field}={changes[field]}, but the tensors of {contents.directory} have {value}; leave it "
                "out, or give another directory"
            )
    if contents.record is None:
        if "num_heads" not in changes:
            logger.warning(
                "the number of heads of the HiCI modules is in no tensor of %s; %d is taken, as published. If it was "
                "trained with another number, give config={'num_heads': N}", contents.directory, PUBLISHED_NUM_HEADS,
            )  # fmt: skip
        return HiCIConfig(**{"num_heads": PUBLISHED_NUM_HEADS, **changes})
    recorded = HiCIConfig.from_dict(contents.record.hici)
    for field, value in {**shapes, "num_heads": changes.get("num_heads", recorded.num_heads)}.items():
        if _shape_field(recorded, field) != value:
            raise ValueError(
                f"{contents.directory / RECORD_FILE}: {field}={getattr(recorded, field)}, but the tensors or the given "
                f"config have {value}; leave it out of the config, or copy the directory again"
            )
    if isinstance(given, HiCIConfig):
        left = [
            name
            for name in recorded.to_dict()
            if name not in changes and getattr(given, name) != getattr(recorded, name)
        ]
        if left:
            logger.info(
                "%s of the given config are at their defaults and taken from %s", ", ".join(left), contents.name
            )
    return recorded.replace(**changes)


def _shape_field(config: HiCIConfig, field: str) -> Any:
    # an integrator as wide as the bottleneck may be written down or not
    same_width = field == "integrator_dim" and config.integrator_dim == config.bottleneck_dim
    return None if same_width else getattr(config, field)


def _module_shapes(contents: Contents) -> dict[str, Any]:
    """The HiCIConfig fields that tensors show, from whichever layer has them."""
    shapes = {re.sub(r"^.*?(local_constructor|global_integrator)\.", r"\1.", name): tensor.shape
              for name, tensor in contents.hici.items()}  # fmt: skip
    needed = ["local_constructor.memory_slots", "local_constructor.q_proj.weight", "global_integrator.global_queries"]
    if not any(name.startswith("global_integrator.stat_compressors.0.0") for name in shapes):
        needed.append("global_integrator.shared_compressor.0.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"{contents.file_of('.local_constructor.memory_slots')} has no layer with {', '.join(missing)}, so its "
            "HiCI modules are not whole (missing); copy the file again"
        )
    width = shapes["global_integrator.global_queries"][1]
    bottleneck = shapes["local_constructor.q_proj.weight"][0] if "local_constructor.o_proj.weight" in shapes else None
    shared = shapes.get("global_integrator.shared_compressor.0.weight")
    return {
        "num_local_slots": shapes["local_constructor.memory_slots"][0],
        "num_global_slots": shapes["global_integrator.global_queries"][0],
        "bottleneck_dim": bottleneck,
        "compress_dim": None if shared is None else shared[0],
        "integrator_dim": None if width == bottleneck else width,
    }
