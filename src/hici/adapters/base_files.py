"""The weights of a model directory, one tensor at a time, under the names of the model's class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hici.adapters.hub import find_directory
from hici.adapters.weights import read_tensors, refuse_no_weights
from hici.files import read_json

_OPEN_FILES = 2
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
# buffers that old checkpoints hold and today's classes make themselves
_FORMER_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|attention\.(masked_)?bias$")


def base_directory(name: str) -> Path:
    """The directory of a base model; from the hub its safetensors, or its pickles where it has none."""
    directory = find_directory(name, patterns=("*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja"))
    if not Path(name).expanduser().is_dir() and not list(directory.glob("*.safetensors")):
        directory = find_directory(name, patterns=("*.json", "*.bin", "*.model", "*.txt", "*.md", "*.jinja"))
    return directory


class BaseFiles:
    """Tensors of a model directory by the names of the model's class.

    Args:
        directory: with safetensors or pickled weights, in one file or in shards with their index.
        model: the model on the meta device; its class decides how names in old files are to be read.

    Attributes:
        file_names: the name in the files by the name in the model.

    Raises:
        ValueError: no weights, a missing shard, or tensors that the model does not have.
    """

    def __init__(self, directory: str | Path, model: Any) -> None:
        self.directory = Path(directory)
        self._files = _weight_map(self.directory)
        self._opened: dict[Path, Any] = {}
        state = model.state_dict()
        tied = state.keys() - {name for name, _ in model.named_parameters()} - {n for n, _ in model.named_buffers()}
        rename = _renaming(model)
        self.file_names: dict[str, str] = {}
        strangers = []
        for name in self._files:
            own = rename(name)
            if own in state:
                if own not in tied:  # a second name of a tensor that is there already
                    self.file_names[own] = name
            elif not _FORMER_BUFFERS.search(name):
                strangers.append(name)
        if strangers:
            raise ValueError(
                f"{self.directory} holds {len(strangers)} tensors that a {type(model).__name__} does not have "
                f"({', '.join(strangers[:4])}), which would be dropped; give the plain base model, or load and save it "
                "with transformers first"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.file_names

    def get(self, name: str) -> Tensor:
        """The tensor of that name in the model (mapped from disk, not a copy)."""
        stored = self.file_names[name]
        return self._open(self._files[stored]).get_tensor(stored)

    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor."""
        sizes = {name: self.get(name) for name in list(self.file_names)[:32]}
        return max(sizes.values(), key=lambda tensor: tensor.numel()).dtype

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            while len(self._opened) >= _OPEN_FILES:  # mapped pages count as this process's memory
                del self._opened[next(iter(self._opened))]
            refuse_no_weights(file)
            try:
                self._opened[file] = (safe_open(str(file), framework="pt") if file.suffix == ".safetensors"
                                      else _Pickled(read_tensors(file)))  # fmt: skip
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}); copy the file again") from error
        return self._opened[file]


class _Pickled:
    """Tensors of a pickle file behind the reading method of a safetensors file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _weight_map(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    for name in (_SAFE, _PICKLED):
        index, single = directory / f"{name}.index.json", directory / name
        if index.is_file():
            listed = read_json(index).get("weight_map", {})
            files = {tensor: directory / file for tensor, file in listed.items()}
            missing = sorted({file.name for file in files.values() if not file.is_file()})
            if missing:
                raise ValueError(
                    f"{directory} lacks {', '.join(missing[:4])}, which {index.name} names; copy them again"
                )
            return files
        if single.is_file():
            return dict.fromkeys(read_tensors(single, data=False), single)
    raise ValueError(f"{directory} holds neither {_SAFE} nor {_PICKLED} (nor their index), so it has no weights; give "
                     "a directory with them")  # fmt: skip


def _renaming(model: Any) -> Any:
    """transformers' own renaming of names in files that are older than the model's class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, converters)[0]
