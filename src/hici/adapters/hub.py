"""Directories of the Hugging Face hub, found for reading; and what a name tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hici.adapters.file_names import RECORD_FILE, TRAINABLE_FILE
from hici.models.load import first_line
from hici.models.merged import REMOTE_FILE

# all that a directory of ours, a released one or a merged one can hold; nothing else is downloaded
_MARKS = {"adapter": (RECORD_FILE, TRAINABLE_FILE), "merged": (REMOTE_FILE,)}
_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.md", "*.py", "*.jinja")


def find_directory(
    path_or_hub_id: str | Path, revision: str | None = None, *, patterns: Sequence[str] = _PATTERNS
) -> Path:
    """The local directory of that path, or of that hub repository (downloaded, or from the cache when offline).

    huggingface_hub's own settings hold: HF_HUB_OFFLINE, HF_TOKEN, HF_HOME, ...

    Raises:
        ValueError: neither a directory nor a repository that can be had; `revision` for a local directory.
    """
    text = str(path_or_hub_id)
    directory = Path(text).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} with {text}, which is a directory on this machine and has no "
                             "revisions; leave it out, or give the hub name")  # fmt: skip
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith("."):
        what = "is a file" if directory.is_file() else "does not exist"
        raise ValueError(f"{text} {what}, so it is not a directory, and it is no hub name (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{text} is not a directory here, not in the hub's cache, and the hub could not be reached (or "
            f"HF_HUB_OFFLINE is set); give a directory, or download it where there is a network ({first_line(error)})"
        ) from error
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{text} is not a directory here, and the hub did not give it ({first_line(error)}); check "
                         "the name, the revision and your access (hf auth login)")  from error  # fmt: skip


def cached_directory(name: str, patterns: Sequence[str] = _PATTERNS) -> Path | None:
    """The directory of a model that is on this machine: a path, or what the hub's cache has; None: neither."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def repository_kind(hub_id: str, revision: str | None = None, subfolder: str = "") -> str:
    """ "adapter" (ours or released) or "merged" (with its modules) by the files of a hub repository, else "plain".

    Without a network it is what the cache tells.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    marks = {f"{subfolder}/{name}" if subfolder else name: kind for kind, files in _MARKS.items() for name in files}
    try:
        names = HfApi().list_repo_files(hub_id, revision=revision)
    except HFValidationError:
        return "plain"
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError):  # HTTPError: no network
        names = [name for name in marks if isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str)]
    return next((kind for name, kind in marks.items() if name in names), "plain")


def context_of_name(name: str) -> int | None:
    """The context that a name tells: "Llama-2-7b-HiCI-16k" -> 16 * 1024; None when it tells none.

    It stands at the end, or right after HiCI or LongLoRA; elsewhere it may be the base's own, or a number of steps. A
    path into the hub's cache tells by its repository.
    """
    parts = Path(name).parts
    last = parts[-1] if parts else ""
    if len(parts) >= 3 and parts[-2] == "snapshots":
        last = parts[-3]
    found = re.search(r"(?:^|[^0-9A-Za-z])(\d+)k$", last, re.IGNORECASE) or re.search(
        r"(?:hici|longlora)[-_.](\d+)k(?![0-9a-z])", last, re.IGNORECASE
    )
    return int(found.group(1)) * 1024 if found else None
