"""convert: an adapter from the released layout into ours and back, tensor by tensor, bit for bit."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from hici.adapters.base_files import fingerprints_on_disk
from hici.adapters.card import adapter_card
from hici.adapters.contents import Contents, read_contents
from hici.adapters.file_names import RECORD_FILE
from hici.adapters.hub import find_directory
from hici.adapters.load import base_name, check_fingerprint
from hici.adapters.plan import Plan, make_plan
from hici.adapters.record import LAYOUTS, Record
from hici.adapters.write import copy_tokenizer, write_hici, write_released
from hici.config import HiCIConfig
from hici.files import atomic_directory, check_target, refuse_sources, write_text
from hici.models.load import load_config, stable_name
from hici.models.lookup import HICI
from hici.provenance import provenance
from hici.registry import suggest

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    base_model: str | Path | None = None,
    context_length: int | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> Path:
    """Write an adapter in the other layout, atomically. Every tensor keeps its bits; its name changes place only.

    The base's config.json is read (for rope and vocabulary), its weights only to take their fingerprint, where they
    are on this machine.

    Args:
        source: an adapter directory, or a hub name.
        target: new or empty, unless `overwrite`.
        to: "hici" (ours) or "released" (`adapter_model.bin` + `trainable_params.bin`, for the published code).
        base_model, context_length, config, revision: as in `hici.from_pretrained`.

    Raises:
        ValueError: all that `from_pretrained` refuses; the layout that it has already; no HiCI modules for "hici";
            LoRA settings that the published code cannot express. Nothing on disk has changed then.
    """
    if to not in LAYOUTS:
        raise ValueError(suggest(str(to), LAYOUTS, "layout"))
    target = Path(target).expanduser()
    check_target(target, overwrite=overwrite, marker=RECORD_FILE)
    contents = read_contents(find_directory(source, revision), str(source))
    if contents.layout == to:
        raise ValueError(f"{source} is in the layout {to!r} already; copy it, or give the other one")
    if not contents.has_hici:
        raise ValueError(f"{source} holds no HiCI modules (a LongLoRA adapter), so our layout has no place for it; "
                         "load it with hici.from_pretrained as it is")  # fmt: skip
    name = base_name(contents, base_model)
    refuse_sources(target, contents.directory, *([name] if Path(name).is_dir() else []))
    base_config = load_config(name)
    plan = make_plan(contents, base_config, context_length=context_length, config=config)
    if to == "released" and plan.head is not None:
        raise ValueError(f"{source}: {plan.head} is tied to the embeddings in the base and was trained apart, "
                         "which the released format cannot express; keep it in our format")  # fmt: skip
    record = _record(plan, name, base_config, to)
    lora_config = plan.lora_config()
    if lora_config is not None:
        lora_config.base_model_name_or_path = record.base_model
    write = write_hici if to == "hici" else write_released
    with atomic_directory(target, overwrite=overwrite, marker=RECORD_FILE) as temporary:
        write(temporary, contents.tensors, lora_config, record)
        copy_tokenizer(contents.directory, temporary)
        write_text(temporary / "README.md", adapter_card(record, target.name))
        written = read_contents(temporary)
        _compare(contents, written)
        make_plan(written, base_config)  # what cannot be loaded is not left behind
    return target


def _record(plan: Plan, base: str, base_config: Any, to: str) -> Record:
    assert plan.hici is not None  # convert
    old = plan.contents.record
    found = fingerprints_on_disk(base, base_config)
    if not found:
        logger.warning("the weights of the base %s are not on this machine, or not whole: that the adapter meets the "
                       "right base will be checked by names and shapes only", base)  # fmt: skip
    if old is not None:
        if found and old.base_fingerprint not in ("unknown", *found):
            check_fingerprint(found[0], plan.contents, base)
        return dataclasses.replace(
            old,
            hici=plan.hici.to_dict(),
            base_model=stable_name(base),
            layout=to,
            modules_to_save=plan.modules_to_save if to == "released" else None,
            made_with=provenance(),
        )
    return Record(
        hici=plan.hici.to_dict(),
        attention=HICI,
        context_length=plan.context_length,
        rope_parameters=plan.rope_parameters,
        max_position_embeddings=plan.positions,
        base_model=stable_name(base),
        base_model_type=base_config.model_type,
        base_fingerprint=found[0] if found else "unknown",
        peft=True,
        made_with=provenance(),
        vocab_size=plan.vocab_size if plan.vocab_size != base_config.vocab_size else None,
        layout=to,
    )


def _compare(source: Contents, written: Contents) -> None:
    """Read back before the directory is moved into place."""
    same = source.tensors.keys() == written.tensors.keys() and all(
        torch.equal(tensor, written.tensors[name].reshape(tensor.shape)) and tensor.dtype == written.tensors[name].dtype
        for name, tensor in source.tensors.items()
    )
    if not same:
        raise ValueError(f"what was written differs from {source.directory}, and is thrown away; check the disk")
