"""save_pretrained: everything trained into one directory of ours, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from hici.adapters.card import adapter_card
from hici.adapters.file_names import RECORD_FILE
from hici.adapters.plan import peft_tensors
from hici.adapters.record import Record
from hici.adapters.weights import refuse_bad_values
from hici.adapters.write import write_hici
from hici.files import atomic_directory, check_target, refuse_sources, write_text
from hici.models.architectures.base import is_hici_name
from hici.models.attach import hici_state_dict, write_config
from hici.models.fingerprint import base_checksums, changed_tensors
from hici.models.load import load_config, stable_name
from hici.models.lookup import attention_mode, get_causal_lm, get_decoder, hici_config, is_peft
from hici.models.vocabulary import vocabulary_size
from hici.provenance import provenance


def save_pretrained(
    model: Any,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    context_length: int | None = None,
    training: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write everything trained into one directory, atomically (`hici.from_pretrained` reads it).

    Args:
        model: an attached model, plain (its base weights unchanged since `attach`) or wrapped by PEFT.
        directory: new or empty, unless `overwrite`.
        tokenizer: saved beside it when given.
        context_length: tokens that it was trained for; None: the positions of its rope.
        training: facts about the training for the model card, plain JSON values by name.

    Raises:
        ValueError: nothing attached; base weights that changed or train outside of PEFT (they would be lost); a NaN or
            infinity; parameters sharded over processes; another PEFT adapter than one LoRA called "default"; a
            directory that is not empty, or with `overwrite` is not one of ours. Nothing on disk has changed then.
    """
    directory = Path(directory).expanduser()
    lm, peft = get_causal_lm(model), is_peft(model)
    config = hici_config(model)
    check_target(directory, overwrite=overwrite, marker=RECORD_FILE)
    if Path(str(lm.config.name_or_path)).is_dir():
        refuse_sources(directory, lm.config.name_or_path)
    _refuse_unsavable(model)
    _refuse_losses(model)
    _refuse_resized(model)
    _check_context(context_length, lm.config.max_position_embeddings)
    tensors = {**hici_state_dict(model), **peft_tensors(model)}
    refuse_bad_values(tensors, "this model")
    decoder = get_decoder(model)
    record = Record(
        hici=config.to_dict(),
        attention=attention_mode(model),
        context_length=context_length or lm.config.max_position_embeddings,
        rope_parameters=dict(lm.config.rope_parameters),
        max_position_embeddings=lm.config.max_position_embeddings,
        base_model=stable_name(lm.config.name_or_path),
        base_model_type=lm.config.model_type,
        base_fingerprint=decoder.hici_attached.base_fingerprint,
        peft=peft,
        made_with=provenance(),
        vocab_size=vocabulary_size(model) if hasattr(decoder, "hici_base_fingerprint") else None,
        training=training,
    )
    lora_config = _lora_config(model, record) if peft else None
    with atomic_directory(directory, overwrite=overwrite, marker=RECORD_FILE) as temporary:
        write_hici(temporary, tensors, lora_config, record)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", adapter_card(record, directory.name))
    write_config(model)
    return directory


def _lora_config(model: Any, record: Record) -> Any:
    import copy

    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = record.base_model  # plain PEFT reads the base's name from its own file
    config.inference_mode = True
    return config


def _refuse_unsavable(model: Any) -> None:
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"{len(sharded)} parameters are sharded over processes ({sharded[0]}, ...), and only whole ones are saved; "
            "gather them into an unsharded model first (torch.distributed.checkpoint.state_dict)"
        )
    adapters = getattr(model, "peft_config", {})
    if adapters and (set(adapters) != {"default"} or adapters["default"].peft_type != "LORA"):
        kinds = ", ".join(f"{name} ({config.peft_type})" for name, config in adapters.items())
        raise ValueError(f"the model has the PEFT adapters {kinds}, but one LoRA called 'default' is what a directory "
                         "holds; wrap the attached model with hici.add_lora")  # fmt: skip


def _check_context(context_length: int | None, positions: int) -> None:
    if context_length is not None and (type(context_length) is not int or not 1 <= context_length <= positions):
        raise ValueError(f"context_length={context_length!r} is not a number of tokens from 1 to the {positions} "
                         "positions of the model's rope; leave it out, or call hici.extend_rope first")  # fmt: skip


def _refuse_resized(model: Any) -> None:
    """Rows that nobody can make again: the base has fewer, and they do not come from the published rule."""
    lm, decoder = get_causal_lm(model), get_decoder(model)
    if hasattr(decoder, "hici_base_fingerprint") or not Path(str(lm.config.name_or_path)).is_dir():
        return
    try:
        own = load_config(lm.config.name_or_path).vocab_size
    except ValueError:
        return
    rows = vocabulary_size(model)
    if rows != own:
        raise ValueError(
            f"the embeddings have {rows} rows, but the base {lm.config.name_or_path!r} has {own}, and what was resized "
            "by hand cannot be made again at loading; call hici.grow_vocabulary(model, size) on the base instead of "
            "model.resize_token_embeddings, before hici.attach"
        )


def _refuse_losses(model: Any) -> None:
    """Trained weights that neither PEFT nor the HiCI modules hold are not in the directory."""
    before = get_decoder(model).hici_attached.base_checksums
    lost = changed_tensors(before, base_checksums(get_causal_lm(model)))
    if is_peft(model):
        training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        saved = (".lora_", ".modules_to_save.")
        lost += [name for name in training if not is_hici_name(name) and not any(part in name for part in saved)]
    if lost:
        raise ValueError(
            f"{len(lost)} of the model's own weights changed since hici.attach, or train ({', '.join(lost[:4])}), and "
            "this directory holds HiCI modules and PEFT's part only: they would be lost; train through hici.add_lora "
            "(modules_to_save), or use model.save_pretrained for the whole model"
        )
