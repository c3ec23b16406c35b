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
from typing import Any, NamedTuple

from safetensors import SafetensorError

from hici.files import atomic_directory, file_sha256, read_json, write_json
from hici.models.lookup import FULL

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
        dealt = () if self._rows_meet(other) else _DEALT
        for key in sorted({*self.recipe, *other.recipe} - {*_FREE, *dealt, *same}):
            mine, theirs = self.recipe.get(key), other.recipe.get(key)
            if mine != theirs and not (key == "max_steps" and self._may_go_on(other)):
                found.append(f"{key}: {mine!r} -> {theirs!r}")
        for name in ("data", "base", "rows_a_step"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                short = [str(value).removeprefix("sha256:")[:12] for value in (mine, theirs)]
                found.append(f"{_MEANING[name]}: {short[0]} -> {short[1]}")
        return found

    def _rows_meet(self, other: Identity) -> bool:
        """Whether rows of several lengths are padded together and cut by their number of segments.

        Then what a row gives depends on the rows beside it, and so on how they are dealt out.
        """
        recipe = self.recipe
        padded = recipe.get("packing", "packed") != "packed" or recipe.get("data_format", "text") != "text"
        by_number = recipe.get("method") != FULL and recipe.get("hici", {}).get("segment_size") is None
        return padded and by_number and recipe.get("batch_size") != other.recipe.get("batch_size")

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
                    "files": {path.relative_to(temporary).as_posix(): file_sha256(path) for path in paths},
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
                f"{target} was written but does not read back ({problem.text}); check the disk. Older checkpoints "
                "were kept"
            )
        self._prune(step)
        return target

    def last(self) -> Path | None:
        """The newest whole checkpoint of this run, or None where there is none; damaged ones are passed over.

        Raises:
            ValueError: it belongs to another run (the message says what differs); there are some, but none is whole.
        """
        problems = []
        for path in reversed(checkpoints_of(self.directory)):
            problem = problem_of(path)
            if problem is None:
                self._check_identity(path)
                return path
            logger.warning("%s is not whole (%s); an older checkpoint is looked for", path, problem.text)
            problems.append(f"{path.name}: {problem.text}")
            if problem.damaged:
                self._damaged.add(path)
        if problems:
            raise ValueError(
                f"none of the checkpoints in {self.directory} is whole ({'; '.join(problems)}); restore one, or start "
                "anew in another output_dir or with --overwrite true, which removes them"
            )
        return None

    def clean(self) -> None:
        """Remove what killed writers left under temporary names."""
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

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
        standing = checkpoints_of(self.directory)
        for path in standing[: max(0, len(standing) - self.keep)]:
            if path != self.path(newest):
                _remove(path)


def checkpoints_of(directory: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a directory, and nothing else in it."""
    for path in (*checkpoints_of(directory), *directory.glob(".step-*")):
        _remove(path)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _remove(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)  # first: a half-removed checkpoint is none
    shutil.rmtree(path, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that a whole checkpoint was written after."""
    return int(read_json(checkpoint / COMPLETE)["step"])


class Problem(NamedTuple):
    """Why a checkpoint cannot be resumed. `damaged`: its files are not what was written, so it never can be."""

    text: str
    damaged: bool


def problem_of(path: Path) -> Problem | None:
    """What is wrong with a checkpoint: every file is read and compared with its SHA-256. None: it is whole."""
    try:
        complete = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        digest, version = complete.pop("sha256"), complete["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        return Problem(f"{COMPLETE}: {type(error).__name__}: {error}", damaged)
    if digest != _sha256_of_facts(complete):
        return Problem(f"{COMPLETE} holds other values than were written", True)
    if version != FORMAT_VERSION:
        return Problem(f"format_version {version}; this hici reads {FORMAT_VERSION}", False)
    for name, digest in complete["files"].items():
        try:
            found = file_sha256(path / name)
        except OSError as error:  # a disk that does not answer now may do so later
            return Problem(f"{name}: {error}", isinstance(error, FileNotFoundError))
        if found != digest:
            return Problem(f"{name} has another SHA-256 than when it was written", True)
    return None


def _sha256_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
