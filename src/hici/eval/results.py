"""The JSON of a measurement: one schema for every task, so that results can be read, drawn and compared later.

A result is an object with
    schema         {"name": "hici-result", "version": 1}
    task           "perplexity", "passkey", ...: what was measured
    protocol       how, exactly: {"name": ..., every setting that the numbers depend on}
    model          path, kind, base, fingerprint (of a sample of the weights), weights_checksum (of all of them),
                   tokenizer_fingerprint, adapter_sha256, dtype, device, rope, ...; None: no model was used
    data           files, sha256, sizes; None: generated from the seed alone
    seed           None: nothing is drawn
    conditions     one entry for every attention (and length, ...): attention, visibility, causal, segment_size,
                   segments, context (see `hici.eval.conditions`), and the numbers measured under it
    provenance     versions, git revision, machine, time (see `hici.provenance`)
and what a task adds beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hici.files import read_json

SCHEMA_NAME = "hici-result"
SCHEMA_VERSION = 1
SCHEMA = {"name": SCHEMA_NAME, "version": SCHEMA_VERSION}

_FIELDS = ("task", "protocol", "model", "data", "seed", "conditions", "provenance")


def is_result(value: Any) -> bool:
    """Whether JSON values say of themselves that they are a result, of whichever version."""
    schema = value.get("schema") if isinstance(value, dict) else None
    return isinstance(schema, dict) and schema.get("name") == SCHEMA_NAME


def read_result(path: str | Path) -> dict[str, Any]:
    """A result of this schema's version.

    Raises:
        ValueError: no such file; no JSON; no result; another version; a field that is missing.
    """
    result = read_json(path)
    if not is_result(result):
        raise ValueError(
            f"{path} is no result (its schema is not {SCHEMA_NAME!r}); give a JSON that `hici eval`, `hici score` or "
            "`hici inspect` wrote"
        )
    version = result["schema"].get("version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} is a result of schema version {version!r}, and this hici reads version {SCHEMA_VERSION}; measure "
            f"again, or use the hici that wrote it ({_writer(result)})"
        )
    check_whole(path, result)
    return result


def check_whole(path: str | Path, result: dict[str, Any]) -> None:
    """Raise ValueError when a field of a result is missing."""
    missing = [field for field in _FIELDS if field not in result]
    if missing or not isinstance(result["conditions"], list):
        raise ValueError(
            f"{path} lacks {', '.join(missing) or 'a list of conditions'}, so it is damaged; restore it or measure "
            "again (--overwrite)"
        )


def _writer(result: dict[str, Any]) -> str:
    provenance = result.get("provenance")
    version = provenance.get("hici") if isinstance(provenance, dict) else None
    return f"hici {version}" if version else "its version is not recorded"
