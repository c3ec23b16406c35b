"""What differs between the runs besides their numbers."""

from __future__ import annotations

from hici.report.flat import flatten, shortened
from hici.report.gather import Gathered
from hici.report.numbers import MISSING
from hici.report.page import Block, Cell, Table, Text
from hici.report.section import Section

_LEFT_OUT = ("provenance.time_utc",)  # always differs, and stands in the provenance


def _labels(gathered: Gathered) -> list[str]:
    return list(dict.fromkeys(result.label for result in gathered.results))


def settings_by_run(gathered: Gathered) -> dict[str, dict[str, list[str]]]:
    """{setting: {run: its values}}: of the model and the provenance, and of every task's protocol, data and seed."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in gathered.results:
        record = result.record
        flat = {} if record["model"] is None else flatten(record["model"], "model")
        flat |= flatten(record["provenance"], "provenance")
        task = f"{record['task']}, {record['protocol'].get('name')}"
        for name, depth in (("protocol", 2), ("data", 1), ("seed", 1)):
            flat |= {f"{task}: {key}": value for key, value in flatten(record[name], name, depth).items()}
        for key, value in flat.items():
            values = found.setdefault(key, {}).setdefault(result.label, [])
            if key not in _LEFT_OUT and value not in values:
                values.append(value)
    return found


def _draw(gathered: Gathered) -> list[Block]:
    labels = _labels(gathered)
    rows: list[list[str | Cell]] = []
    for setting, by_run in settings_by_run(gathered).items():
        whole = {label: " / ".join(values) for label, values in by_run.items()}
        shared = len(by_run) == len(labels) or setting.startswith(("model", "provenance"))
        of_same_task = [whole[label] for label in labels if label in whole]
        if len(set(of_same_task)) > 1 or (shared and any(len(values) > 1 for values in by_run.values())):
            rows.append([setting, *(_cell(whole.get(label)) for label in labels)])
    if not rows:
        return [Text("The runs agree in every setting, of model, protocol, data, seed, versions and machine.")]
    caption = "Settings that differ between the runs (not shown: those that agree, and the time)."
    return [Table(caption, ["setting", *labels], rows, text_columns=None)]


def _cell(text: str | None) -> str | Cell:
    return MISSING if text is None else shortened(text)


def _applies(gathered: Gathered) -> bool:
    return len(_labels(gathered)) > 1


SECTION = Section(120, "Differences in settings", _applies, _draw)
