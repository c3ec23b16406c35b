"""Weight files that are no weights: each is named for what it is, and nothing in it is run."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import hici
from golden_checkpoint import CHECKPOINT
from hici.adapters.weights import read_tensors, tensor_shapes

BINS = ("adapter_model.bin", "trainable_params.bin")


def refuse(released, match):
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(released.adapter, **released.needed())


@pytest.mark.parametrize("file", BINS)
@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty; copy the file again"),
        (b"<!DOCTYPE html><html><head><title>404</title>", "is a web page and no weights: the download failed"),
        (b"\n  <html>Sign in</html>", "is a web page and no weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "is a Git LFS pointer and no weights"),
        (b"some words", "damaged or not whole|something else than tensors"),
    ],
    ids=["empty", "html", "html2", "lfs", "text"],
)
def test_something_else_than_weights(released, file, content, match):
    (released.adapter / file).write_bytes(content)
    refuse(released, rf"{file}.*({match})")


@pytest.mark.parametrize("file", BINS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file(released, file, kept):
    path = released.adapter / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refuse(released, rf"{file} is damaged or not whole.*copy the file again")


class Evil:
    """Unpickling this runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("file", BINS)
@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(released, tmp_path, file, way):
    trace = tmp_path / "it-ran"
    evil = {"model.norm.weight": Evil(f"touch {trace}")}
    path = released.adapter / file
    if way == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    refuse(released, rf"{file} is a pickle that holds something else than tensors, and nothing of it was run")
    assert not trace.exists()
    code = f"import pickle, torch; torch.load({str(path)!r}, weights_only=False)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    "values, match",
    [
        ({"a": torch.zeros(2), "epoch": 3}, r"1 entries that are no tensors by name \(epoch\)"),
        ([torch.zeros(2)], "holds a list and no tensors by name"),
        (torch.zeros(2), "holds a Tensor and no tensors by name"),
    ],
)
def test_pickles_of_other_things(tmp_path, values, match):
    torch.save(values, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=match):
        read_tensors(tmp_path / "x.bin")


def test_the_format_before_torch_1_6_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    read = read_tensors(tmp_path / "old.bin")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert tensor_shapes(tmp_path / "old.bin") == {"a": [3, 4], "b": [2]}


def test_shapes_are_read_without_data(tmp_path):
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    tensor = read_tensors(tmp_path / "x.safetensors", data=False)["a"]
    assert (tensor.device.type, tensor.dtype, list(tensor.shape)) == ("meta", torch.bfloat16, [3, 4])
    for file in BINS:
        path = CHECKPOINT / "peft_bf16" / file
        assert tensor_shapes(path) == {name: list(tensor.shape) for name, tensor in read_tensors(path).items()}


def test_nan_is_named_with_its_file(released):
    path = released.adapter / "trainable_params.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.norm.weight"] = torch.full((64,), float("nan"))
    torch.save(tensors, path)
    refuse(released, r"trainable_params.bin holds NaN or infinity in 1 tensors \(model.norm.weight\)")
