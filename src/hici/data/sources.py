"""What `data` names -- files, globs, folders, data sets of the hub -- into files and records, in a stable order.

A record is what becomes one document: a text file, a line of a .jsonl, an object of a .json list, a row of a Parquet
file or of a hub data set. Token files (.bin) hold no records; see `hici.data.documents`.
"""

from __future__ import annotations

import glob
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".text")
LINES_SUFFIXES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (*LINES_SUFFIXES, ".json", ".parquet")
TABLE_SUFFIXES = (".csv", ".tsv")  # refused: their first line and quotes are no text
TOKEN_SUFFIX = ".bin"
HUB = "hub:"
_FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".parquet", TOKEN_SUFFIX)  # a .json beside data is mostly no data
_BATCH = 64  # rows read at a time: one of a long-context set may hold a book


class HubOptions(NamedTuple):
    """How hub data sets are read: split, configuration, and whether without downloading them whole."""

    split: str = "train"
    config: str | None = None
    streaming: bool = False


class Source(NamedTuple):
    """One entry of `data`: files in order, or the name of a hub data set."""

    name: str
    files: tuple[Path, ...]

    @property
    def hub(self) -> str | None:
        """Name of the data set on the hub, or path of one that `datasets` can load."""
        return self.name.removeprefix(HUB) if self.name.startswith(HUB) else None


class Record(NamedTuple):
    """One record: a file's whole text (`number` -1), or the columns of a line or row; `label` names file or set."""

    label: str
    number: int
    value: str | dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return place(self.label, self.number)


def place(label: str, number: int) -> str:
    """The name of one document: `a.txt`, `a.jsonl:12` (a line, from 1) or `a.parquet#12` (from 0)."""
    return label if number < 0 else f"{label}{':' if label.lower().endswith(LINES_SUFFIXES) else '#'}{number}"


def is_token_file(source: str | Path) -> bool:
    """Whether a file, or a document named after one (`a.bin#3`), is of tokens."""
    return str(source).rpartition("#")[0].lower().endswith(TOKEN_SUFFIX) or str(source).lower().endswith(TOKEN_SUFFIX)


def resolve(sources: str | Path | Sequence[str | Path]) -> list[Source]:
    """Every entry with its files, sorted; a file that is named in two ways is read once, where it is named first.

    Raises:
        ValueError: an entry that matches nothing; no entry.
    """
    seen: set[Path] = set()
    resolved = []
    for entry in [sources] if isinstance(sources, (str, Path)) else sources:
        name = str(entry)
        files: list[Path] = []
        for path in () if name.startswith(HUB) else _expand(name):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                files.append(path)
        if files or name.startswith(HUB):
            resolved.append(Source(name, tuple(files)))
    if not resolved:
        raise ValueError(
            f"no data: {sources!r} names no file; give text files, globs, folders, .jsonl, .json, .parquet, .bin, or "
            "hub:org/name"
        )
    return resolved


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _FOLDER_SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"{name} is a folder without {', '.join(_FOLDER_SUFFIXES)} files")
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(f"{name} does not exist, and as a glob it matches no file; check the path")
    return found


def record_sets(source: Source, options: HubOptions) -> Iterator[tuple[str, Iterator[Record] | None]]:
    """(label, records) of every file of a source, or of its hub data set; records None: a token file."""
    if source.hub is not None:
        yield source.name, hub_records(source.hub, options)
    for path in source.files:
        yield str(path), None if is_token_file(path) else file_records(path)


def file_records(path: Path) -> Iterator[Record]:
    """Records of one file, by its ending in any case; what is no .jsonl, .ndjson, .json or .parquet is one UTF-8 text.

    Raises:
        ValueError: a table (.csv, .tsv); an empty, binary or broken file; not UTF-8; a record that is no object.
    """
    suffix = path.suffix.lower()
    if suffix in LINES_SUFFIXES:
        return _jsonl(path)
    if suffix == ".json":
        return _json(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in TABLE_SUFFIXES:
        raise ValueError(
            f"{path} is a table, and its lines are no text; write its rows as .jsonl or .parquet (with pandas: "
            "read_csv, then to_parquet)"
        )
    return iter([Record(str(path), -1, read_text(path))])


def read_text(path: Path) -> str:
    """A text file's content. Raises ValueError when it is empty, binary or not UTF-8."""
    text = _decode(path.read_bytes(), str(path))
    if not text.strip():
        raise ValueError(f"{path} is empty; remove it from the data or fill it")
    return text


def _decode(raw: bytes, place: str) -> str:
    if b"\0" in raw:
        raise ValueError(f"{place} holds NUL bytes, so it is binary, no text; convert it, or name a token file .bin")
    try:
        return raw.decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 (byte {error.start}: {raw[error.start]:#x}); convert it, for example with iconv"
        ) from error


def _jsonl(path: Path) -> Iterator[Record]:
    empty = True
    with path.open("rb") as file:  # bytes: only \n ends a line, since JSON text may hold other line ends
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, f"{path}:{number}")
            if not line.strip():
                continue
            empty = False
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number} is not JSON ({error}); every line of a .jsonl is one object"
                ) from error
            yield _object_record(path, number, value)
    if empty:
        raise ValueError(f"{path} is empty; remove it from the data or fill it")


def _json(path: Path) -> Iterator[Record]:
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); a .json is a list of objects, a .jsonl one a line") from error
    if not isinstance(values, list) or not values:
        what = "an empty list" if values == [] else type(values).__name__
        raise ValueError(
            f"{path} holds {what}, but a .json of data is a list of objects; give such a list, or a .jsonl"
        )
    for number, value in enumerate(values):
        yield _object_record(path, number, value)


def _object_record(path: Path, number: int, value: Any) -> Record:
    record = Record(str(path), number, value)
    if not isinstance(value, dict):
        raise ValueError(
            f"{record.place} is {type(value).__name__}, but every record is an object of named columns; write it as "
            '{"text": ...}'
        )
    return record


def _parquet(path: Path) -> Iterator[Record]:
    parquet = _optional("pyarrow.parquet", f"reading {path}")
    arrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(path)
        rows = (row for batch in file.iter_batches(batch_size=_BATCH) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield Record(str(path), number, row)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({_one_line(error)}); download or write it again") from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} is empty; remove it from the data or fill it")


def hub_records(name: str, options: HubOptions) -> Iterator[Record]:
    """Rows of a data set of the hub, or of a folder that `datasets` can load.

    Raises:
        ValueError: `datasets` is not installed; no such data set, configuration or split; no way to the hub; one that
            is a script.
    """
    datasets = _optional("datasets", f"reading {HUB}{name}")
    place = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        rows = datasets.load_dataset(place, options.config, split=options.split, streaming=options.streaming)
        for number, row in enumerate(rows):
            yield Record(f"{HUB}{name}", number, row)
    # OSError: no connection, none there; RuntimeError: a data set that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the data set {name} could not be read ({_one_line(error)}); check hub:org/name, hub_config "
            f"({options.config}), hub_split ({options.split}) and the connection, or download it and give its files"
        ) from error


def _optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{purpose} needs {package}, which is not installed; pip install 'hici[data]'") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
