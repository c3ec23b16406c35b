"""hici_config.json: everything about an adapter directory that is no tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hici.adapters.file_names import RECORD_FILE
from hici.config import HiCIConfig
from hici.files import read_json
from hici.registry import suggest
from hici.rope import check_rope_parameters

FORMAT_VERSION = 3
LAYOUTS = ("hici", "released")

# keys that the formats before did not have, with what they meant by that
_ADDED = {2: {"vocab_size": None, "layout": "hici", "modules_to_save": None, "training": None}}
_ADDED_TO_HICI = {3: {"decode": "auto"}}


@dataclasses.dataclass(frozen=True)
class Record:
    """What hici_config.json holds.

    Attributes:
        hici: fields of `HiCIConfig`.
        attention: the mode at saving, which is the one trained in when the training ends with saving.
        context_length: tokens that it was trained for.
        rope_parameters, max_position_embeddings: as in the transformers config of the adapted model.
        base_model, base_model_type, base_fingerprint: the base; the fingerprint is "unknown" where nobody saw weights.
        peft: PEFT's two files belong to it.
        made_with: versions, machine, time.
        vocab_size: rows of the embeddings after growing the base's; None: the base's own.
        layout: which files hold the weights ("hici" or "released").
        modules_to_save: in the released layout, the base's modules that were trained whole, by PEFT's names for them
            (our own has them in adapter_config.json).
        training: facts about the training, for the model card; None: none known.
    """

    hici: dict[str, Any]
    attention: str
    context_length: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    base_model: str
    base_model_type: str
    base_fingerprint: str
    peft: bool
    made_with: dict[str, Any]
    vocab_size: int | None = None
    layout: str = "hici"
    modules_to_save: list[str] | None = None
    training: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def read_record(directory: str | Path) -> Record:
    """hici_config.json of a directory, checked key by key: a lost value is no default.

    Raises:
        ValueError: names the file or key.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that hici.save_pretrained wrote")
    file = directory / RECORD_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {RECORD_FILE}, so hici.save_pretrained did not write it whole; copy it "
                         "again, or give another directory")  # fmt: skip
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} instead of keys and values; copy the file again")
    values = _of_this_format(values, file)
    known = [field.name for field in dataclasses.fields(Record)]
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: " + suggest(key, known, "key"))
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; copy the file again")
    for field in dataclasses.fields(Record):
        if not _is_of(str(field.type), values[field.name]):
            raise ValueError(f"{file}: {field.name}={values[field.name]!r} is no {field.type}; copy the file again")
    record = Record(**values)
    if record.layout not in LAYOUTS:
        raise ValueError(f"{file}: " + suggest(record.layout, LAYOUTS, "layout"))
    _check_parts(record, file)
    return record


def _of_this_format(values: dict[str, Any], file: Path) -> dict[str, Any]:
    version = values.get("format_version")
    if version in (1, 2):
        added: dict[str, Any] = _ADDED[2] if version == 1 else {}
        hici = values.get("hici")
        if isinstance(hici, dict):
            values = {**values, "hici": {**_ADDED_TO_HICI[3], **hici}}
        return {**added, **values, "format_version": FORMAT_VERSION}
    if version is not None and version != FORMAT_VERSION:
        made_with = values.get("made_with")
        wrote = made_with.get("hici") if isinstance(made_with, dict) else None
        raise ValueError(
            f"{file} has format_version {version}, but this hici reads 1 to {FORMAT_VERSION}; install the hici that "
            f"wrote it ({wrote})"
        )
    return values


def _is_of(kind: str, value: Any) -> bool:
    kind, _, none = kind.partition(" | ")
    types = {"str": str, "int": int, "bool": bool, "dict[str, Any]": dict, "list[str]": list}
    return (bool(none) and value is None) or (
        isinstance(value, types[kind]) and not (kind == "int" and isinstance(value, bool))
    )


def _check_parts(record: Record, file: Path) -> None:
    """The dicts inside the record are whole: a default in place of a lost value would load as another model."""
    for part, missing in (
        ("hici", [field.name for field in dataclasses.fields(HiCIConfig) if field.name not in record.hici]),
        ("rope_parameters", check_rope_parameters(record.rope_parameters)),
    ):
        if missing:
            raise ValueError(f"{file}: {part} lacks {', '.join(missing)}; copy the file again")
    HiCIConfig.from_dict(record.hici)
