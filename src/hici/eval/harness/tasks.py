"""Tasks of lm-evaluation-harness: found by their names, loaded with their data, and described for a result."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex

from hici.models.load import first_line

_NEAREST = 5


class Seeds(NamedTuple):
    """What lm-eval seeds, with its own defaults: `python`, `numpy` and `torch` for tasks that draw, `few_shot` for the
    choice of examples."""

    python: int = 0
    numpy: int = 1234
    torch: int = 1234
    few_shot: int = 1234


class Tasks(NamedTuple):
    """What is asked for, loaded: `tasks` {name: task of lm-eval}, and the `groups` that they came in {name: group}."""

    asked: list[str]
    tasks: dict[str, Any]
    groups: dict[str, Any]
    seeds: Seeds
    unsafe: bool


def task_manager(names: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """lm-eval's index of tasks, in which every one of `names` is found: a task, group, tag, or a YAML file.

    Args:
        include_path: a directory of task files of one's own; they come before lm-eval's of the same name. Where all
            the names are tasks of one's own, lm-eval's (14,000, some seconds) are not read.

    Raises:
        ValueError: no such directory; an unknown name (with the nearest known ones).
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path} (--include-path) is no directory; give the one that holds the "
                         "tasks' YAML files")  # fmt: skip
    own = TaskManager(include_path=include_path, include_defaults=False)
    # a group or tag of one's own may reach into lm-eval's tasks
    if all(name in own.all_subtasks or _file_kind(name) in (Kind.TASK, Kind.PY_TASK) for name in names):
        return own
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index and _file_kind(name) is None:
            raise ValueError(unknown_task(name, manager.all_tasks))
    return manager


def unknown_task(name: str, known: Sequence[str]) -> str:
    """The text of an error about an unknown task: the nearest of many names."""
    near = difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0.6)
    near += [each for each in known if name in each and each not in near][: _NEAREST - len(near)]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"unknown task {name!r}, which is none of {len(known):,} known ones.{hint} `hici eval lm --list-tasks "
        "'PATTERN*'` lists them; tasks of your own need --include-path"
    )


def matching_tasks(pattern: str, include_path: str | Path | None = None) -> list[tuple[str, str]]:
    """(name, "task" | "group" | "tag") of all that match a pattern with * and ?, sorted."""
    manager = TaskManager(include_path=include_path)
    kinds = {Kind.GROUP: "group", Kind.TAG: "tag"}
    return [(name, kinds.get(manager.task_index[name].kind, "task")) for name in sorted(manager.match_tasks([pattern]))]


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    seed: int | None = None,
    unsafe: bool = False,
) -> Tasks:
    """Tasks with their data; groups and tags are taken apart.

    Seeds the generators of Python, NumPy and torch, as lm-eval does: some tasks draw when they are loaded.

    Args:
        names: of tasks, groups or tags, or YAML files.
        include_path: a directory with task files of one's own.
        num_fewshot: examples before each question; None: as each task says. A task that is set to 0 stays so.
        seed: of everything that lm-eval draws; None: its own defaults.
        unsafe: permit tasks that run code which the model has written.

    Raises:
        ValueError: an unknown name; data that are not there; a task that needs a package, images, or `unsafe`; one
            named twice.
    """
    seeds = Seeds() if seed is None else Seeds(seed, seed, seed, seed)
    manager = task_manager(names, include_path)
    plant_seeds(seeds)
    found = Tasks(list(names), {}, {}, seeds, unsafe)
    for name in names:
        part = _load(manager, name)
        for twice in part["tasks"].keys() & found.tasks.keys():
            raise ValueError(f"task {twice!r} is asked for twice, once by {name!r}; name it once")
        found.tasks.update(part["tasks"])
        found.groups.update(part.get("groups", {}))
    for name, task in found.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe:
            raise ValueError(f"task {name!r} runs code that the model has written, with all that you may do; give "
                             "--run-unsafe-code if this machine may bear it")  # fmt: skip
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {name!r} shows images, which no model of hici sees; leave it out")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        _check_examples(name, task)
    return found


def plant_seeds(seeds: Seeds, task: Any = None) -> None:
    """Seed the generators of Python, NumPy and torch, and that of the task's choice of examples."""
    random.seed(seeds.python)
    np.random.seed(seeds.numpy)
    torch.manual_seed(seeds.torch)
    if task is not None:
        task.set_fewshot_seed(seed=seeds.few_shot)


def describe_task(task: Any) -> dict[str, Any]:
    """What a task's numbers depend on: version, examples, settings and their hash. JSON values."""
    config = dict(task.dump_config())
    # where the file lies changes nothing
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    config = json.loads(_stable_json(config))
    return {
        "version": task.VERSION,
        "output_type": task.OUTPUT_TYPE,
        "num_fewshot": task.get_config("num_fewshot"),
        "config_sha256": hashlib.sha256(_stable_json(config).encode()).hexdigest(),
        "config": config,
    }


def describe_documents(task: Any) -> dict[str, Any]:
    """How many documents a task has, and the hash of their contents as the task sees them; the same of those that
    examples are chosen from, where there are examples."""
    count, digest = _count_and_hash(task.eval_docs)
    described: dict[str, Any] = {"documents": count, "sha256": digest}
    if task.get_config("num_fewshot"):
        count, digest = _count_and_hash(_example_documents(task))
        described |= {"example_documents": count, "example_sha256": digest}
    return described


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except ImportError as error:
        raise ValueError(f"task {name!r} needs a package that is not installed ({first_line(error)})") from error
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ValueError(
            f"task {name!r} could not be loaded with its data ({type(error).__name__}: {first_line(error)}); without a "
            "network its data must lie in the cache of `datasets` (HF_HOME), or in local files that a task of your own "
            "names (dataset_path: json, dataset_kwargs: data_files; --include-path)"
        ) from error


def _check_examples(name: str, task: Any) -> None:
    """Raise ValueError where there are fewer documents than examples are asked for."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return
    available = len(_example_documents(task))
    split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
    if split is not None and split == task.get_config("test_split"):
        available -= 1  # the question is none of its own examples
    if wanted > available:
        raise ValueError(f"task {name!r} with {wanted} examples (--num-fewshot), but it has {available} documents to "
                         "take them from; give no more than that")  # fmt: skip


def _example_documents(task: Any) -> list[Any]:
    """What examples are drawn from."""
    sampler = getattr(task, "sampler", None)  # has read them already
    return list((task.fewshot_docs() if sampler is None else sampler.df) or ())


def _count_and_hash(documents: Iterable[Any]) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for document in documents:
        digest.update(_stable_json(document).encode() + b"\n")
        count += 1
    return count, digest.hexdigest()


def _file_kind(name: str) -> Kind | None:
    """What a YAML file defines; None where the name is that of no such file."""
    path = Path(name)
    entry = TaskIndex.entry_from_path(path) if path.suffix in (".yaml", ".yml") and path.is_file() else None
    return None if entry is None else entry.kind


def _stable_json(value: Any) -> str:
    """JSON that is the same in every process: of what is no JSON value, the type's name alone."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_stable)


def _stable(value: Any) -> Any:
    if isinstance(value, (bytes, Path)):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return str(value) if hasattr(value, "isoformat") else type(value).__qualname__
