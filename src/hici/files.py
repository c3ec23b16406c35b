"""Files that are whole or absent: written under a temporary name, synced, moved into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success it becomes `target`, on an error nothing changes.

    `marker`: a file that a directory of this kind holds; only such a one is replaced.

    Raises:
        ValueError: as `check_target`.
    """
    target = Path(target)
    if target.is_symlink():  # what it points to is replaced, and the link stays
        target = target.resolve()
    check_target(target, overwrite=overwrite, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes 0600, which nobody else could read
            _sync(path)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's 0700 is for the temporary only
        _swap(temporary, target)
        _sync(target.parent)  # the rename itself
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: str | Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Whether a directory may be written at `target`.

    Raises:
        ValueError: it is a file or cannot be made; it is not empty and `overwrite` is False; it is not empty and lacks
            `marker`, so that it is something else than what is to be replaced.
    """
    target = Path(target)
    if target.resolve() == Path.cwd():
        raise ValueError(
            f"{target} is the current directory, which cannot be replaced as a whole; give a name below it"
        )
    if target.is_file():
        raise ValueError(f"{target} is a file, but a directory is to be written there; give another name")
    check_writable(target.parent)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{target} exists and is not empty, and nothing is overwritten silently; give another directory or "
            "overwrite=True (--overwrite; in `hici train` --overwrite true)"
        )
    if marker is not None and not (target / marker).is_file():
        raise ValueError(
            f"{target} holds no {marker}, so it is no directory of this kind, and overwriting would delete what it "
            "holds; give another directory"
        )


def refuse_sources(target: str | Path, *sources: str | Path) -> None:
    """Raise ValueError when writing `target` would replace what is read: a source itself, or one inside of it."""
    place = Path(target).expanduser().resolve()
    for source in sources:
        read = Path(source).expanduser().resolve()
        if place == read or place in read.parents:
            raise ValueError(f"{target} is or holds {source}, which is read; give a directory outside of it")


def check_writable(directory: str | Path) -> None:
    """Raise ValueError unless files can be written in `directory`, which need not exist yet."""
    directory = Path(directory).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "is not writable" if existing.is_dir() else "is a file"
        raise ValueError(f"nothing can be written in {directory}: {existing} {problem}; give another place")


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it becomes `target`, on an error nothing changes."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write a text file in UTF-8; a reader sees the old content or the new, never a part."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return Path(target)


def write_json(target: str | Path, value: Any) -> Path:
    """Write indented JSON; NaN and infinity raise ValueError, since they are not JSON."""
    return write_text(target, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises ValueError naming the file when it is missing or not JSON."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it should be a JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or write it again") from error


def append_line(path: str | Path, value: Any) -> None:
    """Append one JSON line and sync it: a kill leaves it whole, or torn at the file's end (see `split_torn`)."""
    with Path(path).open("ab") as file:
        file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def split_torn(content: bytes) -> tuple[bytes, bytes]:
    """(whole lines, what is left of a last line that was not finished).

    A last line that lacks only its newline counts as whole.
    """
    whole, newline, last = content.rpartition(b"\n")
    if not last:
        return content, b""
    try:
        finished = isinstance(json.loads(last), dict)
    except ValueError:
        finished = False
    return (content + b"\n", b"") if finished else (whole + newline, last)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap(temporary: Path, target: Path) -> None:
    """Rename into place; an old directory steps aside first and is removed only after the new one stands."""
    if not target.exists():
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.rename(target, aside / "old")
    except BaseException:
        aside.rmdir()
        raise
    try:
        os.rename(temporary, target)
    except BaseException:  # an interrupt too: the old one goes back
        os.rename(aside / "old", target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
