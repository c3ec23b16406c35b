"""The weights of a model directory, one tensor at a time, under the names of the model's class."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hici.adapters.hub import cached_directory, find_directory
from hici.adapters.weights import read_tensors, refuse_no_weights
from hici.files import read_json
from hici.models.architectures.base import is_hici_name
from hici.models.fingerprint import fingerprint
from hici.models.load import first_line, meta_model, name_translator

logger = logging.getLogger(__name__)

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
        drop_modules: HiCI modules in the files are left out (others come in their place).

    Attributes:
        file_names: the name in the files by the name in the model.

    Raises:
        ValueError: no weights, a missing shard, tensors that the model does not have, tied ones that differ.
    """

    def __init__(self, directory: str | Path, model: Any, *, drop_modules: bool = False) -> None:
        self.directory = Path(directory)
        self.model_type: str = model.config.model_type
        self._files = _weight_map(self.directory)
        self._opened: dict[Path, Any] = {}
        state = model.state_dict()
        tied = {name: own for name, own in _tied(model).items() if name in state}
        rename = name_translator(model)
        self.file_names: dict[str, str] = {}
        strangers = []
        for name in self._files:
            own = rename(name)
            if own in state:
                self.file_names[own] = name
            elif not (_FORMER_BUFFERS.search(name) or (drop_modules and is_hici_name(name))):
                strangers.append(name)
        if strangers:
            raise ValueError(
                f"{self.directory} holds {len(strangers)} tensors that a {type(model).__name__} does not have "
                f"({', '.join(strangers[:4])}), which would be dropped; give the plain base model, or load and save it "
                "with transformers first"
            )
        for second, first in tied.items():
            self._drop_second(second, first)

    def _drop_second(self, second: str, first: str) -> None:
        """A tied tensor that stands in the files under its second name, alone or too."""
        if second in self.file_names and first not in self.file_names:
            self.file_names[first] = self.file_names.pop(second)
        if second in self.file_names and first in self.file_names:
            if not torch.equal(self.get(second), self.get(first)):
                raise ValueError(
                    f"{self.directory}: its config.json ties {second} to {first}, but the files hold two different "
                    "tensors; set tie_word_embeddings=false there if they are meant to differ"
                )
            del self.file_names[second]

    def __contains__(self, name: str) -> bool:
        return name in self.file_names

    def get(self, name: str) -> Tensor:
        """The tensor of that name in the model (mapped from disk, not a copy)."""
        stored = self.file_names[name]
        try:
            return self._open(self._files[stored]).get_tensor(stored)
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{self._files[stored]} lacks {stored}, which its index names; copy the files again"
            ) from error

    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor."""
        return self.get(max(self.file_names, key=lambda name: self.get(name).numel())).dtype

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


def _tied(model: Any) -> dict[str, str]:
    """Second names of tied tensors, and the first ones."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: owners[id(p)] for name, p in every.items() if owners[id(p)] != name}


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
        if single.is_file():  # before an index, as transformers has it
            return dict.fromkeys(read_tensors(single, data=False), single)
        if index.is_file():
            values = read_json(index)
            listed = values.get("weight_map") if isinstance(values, dict) else None
            if not isinstance(listed, dict):
                raise ValueError(f"{index} has no weight_map; copy the file again")
            files = {tensor: directory / file for tensor, file in listed.items()}
            missing = sorted({file.name for file in files.values() if not file.is_file()})
            if missing:
                raise ValueError(
                    f"{directory} lacks {', '.join(missing[:4])}, which {index.name} names; copy them again"
                )
            return files
    raise ValueError(f"{directory} holds neither {_SAFE} nor {_PICKLED} (nor their index), so it has no weights; give "
                     "a directory with them")  # fmt: skip


def files_fingerprints(files: BaseFiles, model: Any) -> list[str]:
    """The base's fingerprint as its files give it: as stored, and as read in float16 (which rounds differently).

    "unknown" where a tensor of the model is not in the files, or is quantised.
    """
    tied = _tied(model)
    names = {name: tied.get(name, name) for name in model.state_dict()}
    if any(source not in files for source in names.values()):
        return ["unknown"]
    return [
        fingerprint((name, files.get(source)) for name, source in names.items()),
        fingerprint((name, _in_half(files.get(source))) for name, source in names.items()),
    ]


def fingerprints_on_disk(name: str, model_config: Any) -> list[str]:
    """`files_fingerprints` of a base on this machine (a path, or in the hub's cache); [] when they cannot be taken."""
    directory = cached_directory(name)
    if directory is None:
        return []
    meta = meta_model(model_config)
    try:
        found = files_fingerprints(BaseFiles(directory, meta, drop_modules=True), meta)
    except ValueError as error:
        logger.warning("no fingerprint could be taken of the base %s (%s)", name, first_line(error))
        return []
    return [] if "unknown" in found else found


def _in_half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
