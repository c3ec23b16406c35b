"""What `compare.py` makes before any method starts: the base with its context cut, token files, and the recipes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from hici.data.sources import resolve
from hici.data.stream import load_stream
from hici.files import atomic_directory, read_json, write_json
from hici.train.recipe import Recipe, apply_overrides, recipe_from_dict

FULL, S2 = "full", "hici_s2"
HICI_PREFIX = "hici-"
METHODS = (FULL, S2, "hici-all", "hici-current", "hici-past")
# keys of a recipe that the comparison sets itself, and what sets them
OWN_KEYS = {
    "model": "--model", "data": "--books", "output_dir": "--scratch", "context_length": "--context",
    "method": "--methods", "max_steps": "--steps", "seed": "--seeds", "hici.visibility": "--methods",
    "heldout_data": "--test-book", "heldout_fraction": "--test-book", "heldout_windows": "--eval-windows",
    "overwrite": "--resume", "segment_counts": "--hici.segment_size",
}  # fmt: skip
SHARED_RECIPE = Path(__file__).with_name("compare.yaml")
_CONFIG, _TOKENIZER_FILES = "config.json", ("tokenizer.json", "tokenizer_config.json", "config.json")


class Data(NamedTuple):
    """Token files: a folder with one .bin a training book, the test book's, and facts about them."""

    train: Path
    test: Path
    facts: dict[str, Any]


# ---- the base


def cut_base(model: Path, positions: int, scratch: Path) -> Path:
    """A directory in `scratch` that is `model` with max_position_embeddings=`positions`: links and a config.

    Raises:
        ValueError: no model directory, or one that represents fewer positions.
    """
    if not (model / _CONFIG).is_file():
        raise ValueError(
            f"--model {model} holds no {_CONFIG}; give a model's directory (the benchmark downloads nothing)"
        )
    config = read_json(model / _CONFIG)
    own = config.get("max_position_embeddings")
    if own is None or own < positions:
        raise ValueError(
            f"--base-context {positions}, but {model} represents {own} positions, and a base cannot be cut to more "
            "than it has; give a smaller one"
        )
    target = scratch / f"base-{positions}-{files_hash(p for p in model.iterdir() if p.is_file())[:12]}"
    if target.is_dir():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=scratch))
    for file in model.iterdir():  # links and no copies: a base may have many gigabytes
        if file.is_file() and file.name != _CONFIG:
            (temporary / file.name).symlink_to(file.resolve())
    write_json(temporary / _CONFIG, {**config, "max_position_embeddings": positions})
    os.rename(temporary, target)
    return target


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in the order of the names."""
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# ---- the text


def find_books(folder: Path, test_book: str) -> tuple[list[Path], Path]:
    """(training books, the test book) of a folder of text files. `test_book`: a file's name, or without its ending.

    Raises:
        ValueError: no folder, no such book, or no other one.
    """
    if not folder.is_dir():
        raise ValueError(f"--books {folder} is no folder; give one of text files, a book each")
    books = [path for source in resolve(folder) for path in source.files if path.suffix != ".bin"]
    tests = [path for path in books if test_book in (path.name, path.stem)]
    if len(tests) != 1:
        names = ", ".join(path.name for path in books)
        raise ValueError(f"--test-book {test_book} is {len(tests)} of the books of {folder}; give one of: {names}")
    if len(books) == 1:
        raise ValueError(f"{folder} holds {books[0].name} only, which leaves none to train on; add books")
    return [path for path in books if path != tests[0]], tests[0]


def prepare_data(folder: Path, test_book: str, base: Path, scratch: Path) -> Data:
    """Tokenise all books once, so that every run reads the same tokens and none spends its time on it.

    Raises:
        ValueError: as `find_books`, and as `load_stream`; the test book's text is also a training book.
    """
    training, test = find_books(folder, test_book)
    made_of = files_hash([*training, test, *(base / name for name in _TOKENIZER_FILES if (base / name).is_file())])
    target = scratch / f"data-{test.stem}-{made_of[:12]}"
    if not target.is_dir():
        _tokenise(training, test, base, target)
    return Data(target / "train", target / "test.bin", read_json(target / "data.json"))


def _tokenise(training: list[Path], test: Path, base: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, vocab_size = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base).vocab_size
    test_stream, _ = load_stream([test], tokenizer, vocab_size=vocab_size)
    with atomic_directory(target) as temporary:
        (temporary / "train").mkdir()
        sizes = {}
        for path in training:
            stream, _ = load_stream([path], tokenizer, vocab_size=vocab_size)
            if np.array_equal(stream, test_stream):
                raise ValueError(f"{test} has the text of {path}, which is trained on; take one of them out of --books")
            write_tokens(temporary / "train" / f"{path.name}.bin", stream, vocab_size)
            sizes[path.name] = len(stream)
        write_tokens(temporary / "test.bin", test_stream, vocab_size)
        made = [*(temporary / "train").iterdir(), temporary / "test.bin"]
        write_json(temporary / "data.json", {
            "training_books": sizes, "training_tokens": sum(sizes.values()), "test_book": test.name,
            "test_tokens": len(test_stream), "sha256": files_hash(made),
        })  # fmt: skip


def write_tokens(target: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """A token file of the published layout, as `hici.data.documents.map_token_file` reads it."""
    tokens.astype("<u2" if vocab_size <= 65_535 else "<u4").tofile(target)


# ---- the recipes


def shared_values(overrides: Sequence[str], context: int) -> dict[str, Any]:
    """What the recipes of all methods have in common: compare.yaml with `--key value` overrides.

    Raises:
        ValueError: a key that the comparison sets itself; as `apply_overrides`.
    """
    values = yaml.safe_load(SHARED_RECIPE.read_text(encoding="utf-8"))
    given = apply_overrides({}, overrides)
    flat = [*given, *(f"hici.{name}" for name in given.get("hici", {}))]
    for key in flat:
        if key in OWN_KEYS:
            raise ValueError(f"--{key} is set by the comparison itself; use {OWN_KEYS[key]}")
    values = apply_overrides(values, overrides)
    hici = values.setdefault("hici", {})
    if hici.get("segment_size") is None and hici.get("num_segments") is None:
        hici["segment_size"] = -(-context // 4)  # four segments, as published
    return dict(values)


def make_recipe(
    shared: dict[str, Any], method: str, seed: int, *, base: Path, data: Path, context: int, steps: int, output: Path,
    profile: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe of one run. Nothing but `method` and hici.visibility differs between methods.

    `profile`: a short run for its time alone, without checkpoints.
    """
    hici = dict(shared["hici"])
    if method.startswith(HICI_PREFIX):
        hici["visibility"] = method.removeprefix(HICI_PREFIX)
    return recipe_from_dict({
        **shared, "hici": hici, "method": "hici" if method.startswith(HICI_PREFIX) else method, "seed": seed,
        "model": str(base.resolve()), "data": [str(data.resolve())], "context_length": context, "max_steps": steps,
        "output_dir": str(output.resolve()), "heldout_windows": 0, "overwrite": True,
        **({"save_steps": 0} if profile else {}),
    })  # fmt: skip


def spec_key(spec: dict[str, Any]) -> str:
    """What a result was made from, as one hash."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def changed(before: dict[str, Any], spec: dict[str, Any]) -> str:
    """Which keys of two specs differ; empty: none."""
    old, new = _flat(before), _flat(spec)
    keys = [key for key in {**old, **new} if key not in ("recipe", "hici") and old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {old.get(key)} then, {new.get(key)} now" for key in keys)


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    recipe = spec.get("recipe", {})
    return {**spec, **recipe, **{f"hici.{key}": value for key, value in recipe.get("hici", {}).items()}}
