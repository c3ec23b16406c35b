"""How every number was made."""

from __future__ import annotations

from typing import Any

from hici.eval.labels import attention_label
from hici.report.flat import flatten, shortened
from hici.report.gather import Gathered, Result
from hici.report.numbers import MISSING, whole
from hici.report.page import Block, Cell, Facts, Heading, Table
from hici.report.section import Section

_COLUMNS = ("file", "run", "task", "protocol", "model", "fingerprint", "adapter files", "attention", "visibility",
            "segments", "contexts", "rope", "dtype", "data", "seed", "hici", "git revision", "packages", "time (UTC)",
            "machine")  # fmt: skip
_MADE = ("schema", "task", "protocol", "model", "data", "seed", "processes", "provenance")  # of a result


def _draw(gathered: Gathered) -> list[Block]:
    rows = [_row(result) for result in gathered.results]
    rows += [_comparison_row(str(each.path), each.label, each.record) for each in gathered.comparisons]
    return [
        Table("How every result was made. Long values are shortened, and whole below.", _COLUMNS, rows, None),
        Heading("In full, file by file"),
        *(Facts(f"{result.path} ({result.label})", _facts(result)) for result in gathered.results),
        *(
            Facts(f"{each.path} ({each.label})",
                  [*flatten({name: each.record[name] for name in ("settings", "data", "made_with")}).items()])
            for each in gathered.comparisons
        ),
    ]  # fmt: skip


def _row(result: Result) -> list[str | Cell]:
    record = result.record
    model: dict[str, Any] = record["model"] or {}
    data: dict[str, Any] = record["data"] or {}
    conditions = record["conditions"]
    return [
        shortened(str(result.path), 40),
        result.label,
        record["task"],
        str(record["protocol"].get("name", MISSING)),
        shortened(str(model.get("path", "none")), 40),
        _short(model.get("fingerprint")),
        _hashes(model.get("adapter_sha256")),
        _joined(attention_label(each) for each in conditions),
        _joined(each["visibility"] for each in conditions),
        _joined(whole(each.get("segments")) for each in conditions if each.get("segments") is not None),
        _joined(whole(each.get("context")) for each in conditions if each.get("context") is not None),
        _rope(model.get("rope")),
        str(model.get("dtype", MISSING)),
        _data(data, record["seed"]),
        MISSING if record["seed"] is None else str(record["seed"]),
        *_made(record["provenance"]),
    ]


def _comparison_row(path: str, label: str, record: dict[str, Any]) -> list[str | Cell]:
    measured = [each for run in record["runs"] for each in run["evaluations"]]
    attentions = _joined(attention_label(each | {"causal": not each["leaks_future"]}) for each in measured)
    contexts = _joined(whole(each["windows"]["context"]) for each in measured)
    settings = record["settings"]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in record["runs"]))
    return [shortened(path, 40), label, "training comparison", MISSING, str(settings.get("model", MISSING)), MISSING,
            MISSING, attentions, MISSING, MISSING, contexts, MISSING, str(settings.get("eval_precision", MISSING)),
            _short(record["data"].get("sha256")), seeds, *_made(record["made_with"])]  # fmt: skip


def _made(made: dict[str, Any]) -> list[str | Cell]:
    packages = ", ".join(f"{name} {version}" for name, version in (made.get("packages") or {}).items() if version)
    machine: dict[str, Any] = made.get("machine") or {}
    text = ", ".join(str(machine[name]) + (" threads" if name == "cpu_threads" else "")
                     for name in ("device", "cpu_threads", "system") if machine.get(name))  # fmt: skip
    return [str(made.get("hici", MISSING)), _short(made.get("git_revision")), shortened(packages or MISSING, 44),
            str(made.get("time_utc") or MISSING).replace("+00:00", "").replace("T", " "),
            shortened(text or MISSING, 44)]  # fmt: skip


def _facts(result: Result) -> list[tuple[str, str]]:
    made = {name: result.record[name] for name in _MADE if name in result.record}
    return [("file", str(result.path)), *flatten(made).items()]


def _data(data: dict[str, Any], seed: int | None) -> str | Cell:
    """The hash of the data, or of its files; what is drawn from a seed has none."""
    if not data:
        return MISSING if seed is None else "generated"
    found = data.get("sha256")
    return _hashes(found) if isinstance(found, dict) else _short(found)


def _short(value: Any) -> str | Cell:
    return MISSING if value is None else shortened(str(value))


def _hashes(hashes: dict[str, str] | None) -> str | Cell:
    """Of files: those of the weights, or the first, and how many more there are."""
    if not hashes:
        return MISSING
    shown = [name for name in hashes if name.endswith((".safetensors", ".bin"))] or list(hashes)[:1]
    text = ", ".join(f"{name} {hashes[name][:12]}" for name in shown)
    more = f", and {len(hashes) - len(shown)} more" if len(hashes) > len(shown) else ""
    return Cell(text + more, ", ".join(f"{name} {value}" for name, value in hashes.items()))


def _rope(rope: Any) -> str:
    if not isinstance(rope, dict):
        return MISSING
    kind = rope.get("extended") or (rope.get("rope_parameters") or {}).get("rope_type", "its own")
    return f"{kind}{' (extended)' if rope.get('extended') else ''}, {whole(rope.get('positions'))}"


def _joined(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or MISSING


SECTION = Section(130, "Provenance", lambda gathered: bool(gathered.results or gathered.comparisons), _draw)
