"""Measurements that go on after a kill, in one process or several, and end in one result file.

A measurement is a `Plan`: a list of independent parts, and a function that measures one. What is measured already
stands in a journal beside the result, NAME.partial-0.jsonl (one a process): its first line says what is measured, every
other one is a part. When the result stands, the journals go.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hici.eval.results import SCHEMA, check_whole, is_result
from hici.files import append_line, check_writable, read_json, split_torn, write_json
from hici.processes import everyones, join_processes, only_run_in, rank, world_size
from hici.provenance import provenance

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (parts done, parts in all)

_CHANGING = ("time_utc", "machine")  # of the provenance: may differ between the runs of one measurement


@dataclass(frozen=True)
class Plan:
    """A measurement before it is made. All values are JSON values.

    Attributes:
        task, protocol, model, data, seed: as in a result (`hici.eval.results`).
        parts: names of the parts, each once, in the order in which they are measured.
        measure_part: name -> its value. Values must not depend on which parts were measured before.
        summarise: {name: value} of all parts -> the result's other fields, `conditions` among them.
    """

    task: str
    protocol: dict[str, Any]
    model: dict[str, Any] | None
    data: dict[str, Any] | None
    seed: int | None
    parts: Sequence[str]
    measure_part: Callable[[str], Any]
    summarise: Callable[[dict[str, Any]], dict[str, Any]]

    def header(self) -> dict[str, Any]:
        """What a result says before its numbers."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "protocol": self.protocol,
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
        }


def measure(
    plan: Plan, target: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """The result of `plan`, the same in every process; written to `target` where there is one.

    What an earlier run of the same measurement has left at `target` is taken over: parts, or the whole result. Same
    means all of the header and the provenance but time and machine; what differs is an error that names it.

    Several processes (torchrun, accelerate launch) share the parts.

    Args:
        target: a .json file. None: nothing is written, and a kill loses all.
        overwrite: measure everything anew, and replace what is there.

    Raises:
        ValueError: another result or file at `target`; another run that is writing it.
    """
    assert len(set(plan.parts)) == len(plan.parts), "parts have names of their own"
    join_processes()
    made = provenance()
    if target is None:
        return _result(plan, made, _measure_rest(plan, {}, None, progress))
    target = Path(target)
    header = _plain_json(plan.header() | {"provenance": made})
    with contextlib.ExitStack() as stack:
        found: Any = None
        if rank() == 0:  # whose problem the others wait for, and raise too
            try:
                stack.enter_context(_locked(target))
                found = _found(target, header, overwrite)
            except (ValueError, OSError) as error:
                found = str(error)
        found = everyones(found)[0]
        if isinstance(found, str):
            raise ValueError(found)
        whole, values = found
        if whole is not None:
            logger.warning("%s holds this very measurement already; nothing is measured again", target)
            return dict(whole)
        if values:
            logger.warning("%s: %d of %d parts were measured before; going on", target, len(values), len(plan.parts))
        journal = _journal(target, rank())
        if not journal.exists():
            append_line(journal, header)
        result = _result(plan, made, _measure_rest(plan, values, journal, progress))
        if rank() == 0:
            write_json(target, result)
            for path in _journals(target):
                path.unlink()
        everyones(None)  # the result stands for all of them
    return result


def check_target(target: str | Path, *also: str | Path) -> Path:
    """The result's path, where files can be written. `also`: files written beside it.

    Raises:
        ValueError: not a .json name; a directory in its place; a place where nothing can be written.
    """
    target = Path(target).expanduser()
    if target.suffix != ".json":
        raise ValueError(f"{target} does not end in .json, and a result is JSON; give such a name, or a directory")
    for path in (target, *map(Path, also)):
        if path.is_dir():
            raise ValueError(f"{path} is a directory and cannot be written as a file; give another place")
    check_writable(target.parent)
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Context: no other run writes `target`. The first process of a run holds the lock for all of them."""
    lock = f".{target.name}.lock"
    with only_run_in(target.parent, lock):
        try:
            yield
        finally:
            (target.parent / lock).unlink(missing_ok=True)


def _measure_rest(
    plan: Plan, values: dict[str, Any], journal: Path | None, progress: Progress | None
) -> dict[str, Any]:
    """The values of all parts: those that are there, and the rest divided among the processes."""
    rest = [name for name in plan.parts if name not in values]
    mine = rest[rank() :: world_size()]
    done, measured = len(plan.parts) - len(rest), {}
    if progress is not None:
        progress(done, len(plan.parts))
    for number, name in enumerate(mine, start=1):
        measured[name] = _plain_json(plan.measure_part(name))  # as it will be read back
        if journal is not None:
            append_line(journal, {"part": name, "value": measured[name]})
        if progress is not None:
            progress(min(done + number * world_size(), len(plan.parts)), len(plan.parts))
    return values | {name: value for each in everyones(measured) for name, value in each.items()}


def _result(plan: Plan, made: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    in_order = {name: values[name] for name in plan.parts}
    summary = {**plan.summarise(in_order), "processes": world_size()}
    assert "conditions" in summary, "every result has conditions"
    return _plain_json({**plan.header(), **summary, "provenance": made})


def _found(target: Path, header: dict[str, Any], overwrite: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(the finished result or None, parts measured before). Raises ValueError: what is wrong with what is there."""
    if overwrite:
        for path in _journals(target):
            path.unlink()
        return None, {}
    if target.exists() and target.stat().st_size:  # an empty file, as mktemp makes them, holds nothing to keep
        result = _finished(target, header)
        for path in _journals(target):  # of a run that was killed behind writing the result
            path.unlink()
        return result, {}
    values: dict[str, Any] = {}
    for path in _journals(target):
        values |= _read_journal(path, header)
    return None, values


def _finished(target: Path, header: dict[str, Any]) -> dict[str, Any]:
    result = read_json(target)
    if not is_result(result):
        raise ValueError(f"{target} exists and is no result; nothing is overwritten silently: give another --out or "
                         "--overwrite")  # fmt: skip
    _check_same(target, result, header)
    check_whole(target, result)
    return dict(result)


def _read_journal(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Parts of a journal, whose torn last line (a kill) is cut off: more is appended behind it."""
    whole, torn = split_torn(path.read_bytes())
    if torn:
        path.write_bytes(whole)
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        if not entries:  # killed before its first line stood
            path.unlink()
            return {}
        values = {entry["part"]: entry["value"] for entry in entries[1:]}
        if not isinstance(entries[0], dict):
            raise TypeError("its first line is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or give --overwrite to measure all anew") from error
    _check_same(path, entries[0], header)
    return values


def _check_same(path: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless `found` is the same measurement as `header`."""
    for field in header:
        left, right = found.get(field), header[field]
        where = _first_difference(left, right, field, leave_out=_CHANGING if field == "provenance" else ())
        if where is not None:
            name, was, now = where
            raise ValueError(
                f"{path} is of another measurement: its {name} is {was}, now {now}; nothing is overwritten silently: "
                "give another --out, or --overwrite to measure anew"
            )


def _first_difference(left: Any, right: Any, name: str, leave_out: Sequence[str] = ()) -> tuple[str, str, str] | None:
    """(dotted name, value, value) of the first value that differs."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in dict.fromkeys((*left, *right)):
            if key in leave_out:
                continue
            if key not in left or key not in right:
                return f"{name}.{key}", _short(left.get(key)), _short(right.get(key))
            found = _first_difference(left[key], right[key], f"{name}.{key}")
            if found is not None:
                return found
        return None
    return None if left == right else (name, _short(left), _short(right))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-17:]}"


def _journal(target: Path, process: int) -> Path:
    return target.with_name(f"{target.stem}.partial-{process}.jsonl")


def _journals(target: Path) -> list[Path]:
    """Those of all processes of all runs, which may have been more than now."""
    names = (path for path in target.parent.glob("*.jsonl") if path.name.startswith(f"{target.stem}.partial-"))
    return sorted(names)


def _plain_json(value: Any) -> Any:
    """As it is when it is read back from a file: tuples are lists, keys are strings. NaN raises ValueError."""
    return json.loads(json.dumps(value, allow_nan=False))
