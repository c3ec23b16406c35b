"""Reading weight files: safetensors, and pickles as tensors only. What is no such file is named for what it is."""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hici.models.load import first_line

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
           "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head")


def read_tensors(file: str | Path, *, data: bool = True) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file, on the CPU, mapped from disk where the format allows.

    A .bin file is a pickle, and it is only ever unpickled with torch's `weights_only=True`, which runs no code.
    `data=False`: names, shapes and dtypes alone, as tensors on the meta device.

    Raises:
        ValueError: missing, empty, truncated or damaged; a web page or a Git LFS pointer in place of the weights; a
            pickle that holds anything but tensors by name.
    """
    file = Path(file)
    refuse_no_weights(file)
    if file.suffix != ".safetensors":
        return _unpickle(file, "cpu" if data else "meta")
    try:
        with safe_open(str(file), framework="pt") as opened:
            read = opened.get_tensor if data else partial(_without_data, opened)
            return {name: read(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy the file again") from error


def tensor_shapes(file: str | Path) -> dict[str, list[int]]:
    """Names and shapes of a weight file, without its data. Raises ValueError as `read_tensors`."""
    return {name: list(tensor.shape) for name, tensor in read_tensors(file, data=False).items()}


def _without_data(opened: Any, name: str) -> Tensor:
    part = opened.get_slice(name)
    return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")


def bad_values(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _all_finite(tensor)]


def _all_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # float8 has no comparison
        tensor = tensor.float()
    # one pass without temporaries: the smallest and the largest are NaN where any is
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def refuse_bad_values(tensors: dict[str, Tensor], where: str) -> None:
    """Raise ValueError when a tensor holds NaN or infinity; names the first ones."""
    bad = bad_values(tensors)
    if bad:
        raise ValueError(
            f"{where} holds NaN or infinity in {len(bad)} tensors ({', '.join(bad[:4])}); such weights are neither "
            "saved nor loaded: go back to an earlier checkpoint"
        )


def refuse_no_weights(file: Path) -> None:
    """Raise ValueError when the file is missing, or is plainly something else (a failed download)."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist; copy it again from where the directory came")
    with file.open("rb") as opened:
        head = opened.read(256)
    if not head:
        raise ValueError(f"{file} is empty; copy the file again")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise ValueError(
            f"{file} is a web page and no weights: the download failed, or wanted a login; download the file again"
        )
    if head.startswith(_LFS_POINTER):
        raise ValueError(f"{file} is a Git LFS pointer and no weights; fetch the file itself (git lfs pull)")


def _unpickle(file: Path, device: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
            try:
                values = torch.load(file, map_location=device, weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                values = torch.load(file, map_location=device, weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is a pickle that holds something else than tensors, and nothing of it was run "
            f"({first_line(error)}); "
            "such a file can carry code: get the weights from a source that you trust, as safetensors if there are any"
        ) from error
    except Exception as error:
        raise ValueError(f"{file} is damaged or not whole ({first_line(error)}); copy the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} and no tensors by name; give the weights themselves")
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others:
        raise ValueError(
            f"{file} holds {len(others)} entries that are no tensors by name ({', '.join(others[:4])}), which would be "
            "dropped; take them out, or give the file that the training wrote"
        )
    return dict(values)
