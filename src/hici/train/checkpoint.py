"""Checkpoints of a run: whole or absent, verified by reading them back, and refused for another recipe or other data.

    output_dir/checkpoints/step-00000100/
        weights.safetensors     trained parameters, whole, by name
        optimizer.safetensors   AdamW's tensors, "NAME/KEY"
        optimizer.json          its other values and its groups
        trainer_state.json      the Trainer's step and log
        random.pt               random states of every process, and the learning rates' schedule
        global_step100/, latest with DeepSpeed, in place of optimizer.*: its own files, written by every process
        complete.json           written last: step, SHA-256 of every file and of itself, and what the run is

A directory is made under a temporary name, synced and renamed, so a killed run leaves the old one or the
whole new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hici.files import atomic_directory, read_json, write_json

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
FORMAT_VERSION = 1
# keys of a recipe that change nothing about what is computed
_FREE = (
    "output_dir", "overwrite", "logging_steps", "save_steps", "keep_checkpoints", "tensorboard", "data_workers",
    "token_cache", "device", "offload_checkpoints",
)  # fmt: skip
# keys that a fingerprint stands for: told where it differs, free where it is the same (moved files, other spellings)
_STOOD_FOR = {
    "base": ("model",),
    "data": (
        "data", "heldout_data", "data_format", "text_key", "packing", "prompt", "overlong", "hub_split", "hub_config",
        "streaming", "max_documents", "heldout_fraction", "heldout_windows",
    ),
}  # fmt: skip
# how a step's rows are dealt out: their product and the number of processes must stay
_DEALT = ("batch_size", "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is: a checkpoint is resumed only by the same.

    Attributes:
        recipe: `Recipe.to_dict()`.
        data: fingerprint of the training rows.
        base: fingerprint of the base's weights.
        rows_a_step: sequences of an optimizer step over all processes.
    """

    recipe: dict[str, Any]
    data: str
    base: str
    rows_a_step: int

    def differences(self, other: Identity) -> list[str]:
        """What `other` has otherwise, each as "key: this -> other"."""
        found = []
        same = {key for name, keys in _STOOD_FOR.items() if getattr(self, name) == getattr(other, name) for key in keys}
        for key in sorted({*self.recipe, *other.recipe} - {*_FREE, *_DEALT, *same}):
            mine, theirs = self.recipe.get(key), other.recipe.get(key)
            if mine != theirs and not (key == "max_steps" and self._may_go_on(other)):
                found.append(f"{key}: {mine!r} -> {theirs!r}")
        for name in ("data", "base", "rows_a_step"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                short = [str(value).removeprefix("sha256:")[:12] for value in (mine, theirs)]
                found.append(f"{_MEANING[name]}: {short[0]} -> {short[1]}")
        return found

    def _may_go_on(self, other: Identity) -> bool:
        """More steps at constant rates continue the same curve; any other schedule depends on their number."""
        return self.recipe["schedule"] == "constant" and other.recipe["max_steps"] >= self.recipe["max_steps"]


_MEANING = {"data": "training rows (fingerprint)", "base": "base weights (fingerprint)", "rows_a_step": "rows a step"}


class CheckpointStore:
    """The checkpoints of one output directory."""

    def __init__(self, output: Path, identity: Identity, keep: int) -> None:
        self.directory = output / "checkpoints"
        self.identity = identity
        self.keep = keep
        self._damaged: set[Path] = set()  # what `last` passed over

    def path(self, step: int) -> Path:
        """Where a step's checkpoint lies."""
        return self.directory / f"step-{step:08d}"

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Write a checkpoint with `fill(directory)`, read it back, and only then remove the oldest and damaged ones.

        Raises:
            ValueError: no space is left, or what was read back is not what was written. Older ones still stand then.
        """
        target = self.path(step)
        if target in self._damaged:
            _remove(target)
        try:
            with atomic_directory(target, overwrite=True, marker=COMPLETE) as temporary:
                fill(temporary)
                paths = sorted(path for path in temporary.rglob("*") if path.is_file())
                facts = {
                    "format_version": FORMAT_VERSION,
                    "step": step,
                    "files": {path.relative_to(temporary).as_posix(): sha256(path) for path in paths},
                    "identity": dataclasses.asdict(self.identity),
                }
                write_json(temporary / COMPLETE, {**facts, "sha256": _sha256_of_facts(facts)})
        except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
            raise ValueError(
                f"the checkpoint of step {step} could not be written in {self.directory} ({error}); make room or mend "
                "the place, then go on with --resume from the last whole one"
            ) from error
        problem = problem_of(target)
        if problem:
            raise ValueError(
                f"{target} was written but does not read back ({problem}); check the disk. Older checkpoints were kept"
            )
        self._prune(step)
        return target

    def last(self) -> Path | None:
        """The newest whole checkpoint of this run, or None; damaged ones are logged and passed over.

        Raises:
            ValueError: it belongs to another run; the message says what differs.
        """
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            problem = problem_of(path)
            if problem:
                logger.warning("%s is not whole (%s); an older checkpoint is looked for", path, problem)
                self._damaged.add(path)
                continue
            self._check_identity(path)
            return path
        return None

    def clean(self) -> None:
        """Remove what killed writers left under temporary names."""
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check_identity(self, path: Path) -> None:
        saved = Identity(**read_json(path / COMPLETE)["identity"])
        differences = saved.differences(self.identity)
        if differences:
            raise ValueError(
                f"{path} was written by another run; now different: {'; '.join(differences)}. Resume with what wrote "
                "it, or start anew in another output_dir (or with --overwrite true, which removes the old results)"
            )

    def _prune(self, newest: int) -> None:
        for path in self._damaged - {self.path(newest)}:
            _remove(path)
        self._damaged.clear()
        standing = sorted(self.directory.glob("step-*"))
        for path in standing[: max(0, len(standing) - self.keep)]:
            if path != self.path(newest):
                _remove(path)


def _remove(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)  # first: a half-removed checkpoint is none
    shutil.rmtree(path, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that a whole checkpoint was written after."""
    return int(read_json(checkpoint / COMPLETE)["step"])


def problem_of(path: Path) -> str | None:
    """Why a checkpoint is not whole: every file is read and compared with its SHA-256. None: it is."""
    try:
        complete = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        digest, version = complete.pop("sha256"), complete["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE}: {type(error).__name__}: {error}"
    if digest != _sha256_of_facts(complete):
        return f"{COMPLETE} holds other values than were written"
    if version != FORMAT_VERSION:
        return f"format_version {version}; this hici reads {FORMAT_VERSION}"
    for name, digest in complete["files"].items():
        try:
            found = sha256(path / name)
        except OSError as error:
            return f"{name}: {error}"
        if found != digest:
            return f"{name} has another SHA-256 than when it was written"
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
