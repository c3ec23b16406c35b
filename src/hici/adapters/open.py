"""Any model that hici can use, by its name alone: an adapter, a merged model, or a plain one of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.adapters import file_names


def model_kind(name: str) -> str:
    """What a model is: "adapter" (ours, released, LongLoRA's), "merged" (with HiCI modules) or "plain" (transformers).

    Raises:
        ValueError: a path without a model, naming what is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / file).is_file() for file in file_names.ALL):
            return "adapter"
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{name} has neither {file_names.RECORD_FILE} nor config.json, so it holds no model; check the path"
            )
        from hici.models.merged import is_merged_directory

        return "merged" if is_merged_directory(path) else "plain"
    if path.is_file():
        raise ValueError(f"{name} is a file, but a model is a directory or a hub name; give its directory")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{name} does not exist, and it is no hub name (owner/name); check the path")
    from hici.adapters.hub import repository_kind

    return repository_kind(name)


def open_model(
    name: str,
    kind: str,
    attentions: Sequence[str] = ("full",),
    *,
    base_model: str | None = None,
    context_length: int | None = None,
    num_heads: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    segment_size: int | None = None,
    num_segments: int | None = None,
    visibility: str | None = None,
    slots: bool = True,
) -> Any:
    """The model, prepared for every mode of `attentions`, in mode "full", in eval mode.

    Args:
        name, kind: as `model_kind` has them.
        base_model, context_length, num_heads: what an adapter's directory may not tell (`hici.from_pretrained`).
        dtype: None: as the weights are stored.
        segment_size, num_segments, visibility: None: as the directory says.
        slots: False: segments without slots; on a plain model "hici" is possible so only.

    Raises:
        ValueError: incomplete weights; settings that do not go with the model.
    """
    device_map = None if device == "cpu" else device
    segments = {"segment_size": segment_size, "num_segments": num_segments}
    if kind == "plain":
        only_adapter = {"base_model": base_model, "context_length": context_length, "num_heads": num_heads}
        for setting, value in only_adapter.items():
            if value is not None:
                flag = setting.replace("_", "-")
                raise ValueError(f"--{flag} {value} is for an adapter, but {name} is a plain model")
        return _open_plain(name, attentions, dtype, device_map, segments, slots)
    from hici.adapters.load import from_pretrained
    from hici.models.attach import reconfigure
    from hici.models.lookup import is_attached

    model = from_pretrained(
        name,
        base_model=base_model,
        context_length=context_length,
        attention="full",
        config=None if num_heads is None else {"num_heads": num_heads},
        dtype=dtype,
        device_map=device_map,
    )
    beyond_full = [mode for mode in attentions if mode != "full"]
    if beyond_full and not is_attached(model):
        raise ValueError(f"--attention {beyond_full[0]}, but {name} holds no HiCI modules (a LongLoRA adapter); "
                         "give full")  # fmt: skip
    given = {**segments, "visibility": visibility}
    changes: dict[str, Any] = {setting: value for setting, value in given.items() if value is not None}
    if not slots:
        changes |= {"use_global": False, "use_local": False}
    if changes:
        reconfigure(model, **changes)
    return model


def open_tokenizer(name: str, kind: str, base_model: str | None = None) -> Any:
    """The directory's tokenizer, else the base's. Raises ValueError when there is none that can be read."""
    from transformers import AutoTokenizer

    from hici.models.load import first_line

    source: Any = name
    if kind == "adapter":
        from hici.adapters.contents import tokenizer_source
        from hici.adapters.hub import find_directory

        source = tokenizer_source(find_directory(name), base_model)
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {source} could not be loaded ({first_line(error)}); put the tokenizer's "
                         "files beside the model")  from error  # fmt: skip


def _open_plain(
    name: str, attentions: Sequence[str], dtype: str | None, device_map: Any, segments: dict[str, Any], slots: bool
) -> Any:
    from hici.models.load import load_plain_model

    needs_segments = [mode for mode in attentions if mode != "full"]
    if not needs_segments:
        return load_plain_model(name, dtype, device_map)
    if "hici" in needs_segments and slots:
        raise ValueError(
            f"--attention hici on {name}, a plain model: its slots would be fresh random ones, and the result would "
            "say nothing; give a directory that `hici train` wrote, or --no-slots (slots=False) for segments alone"
        )
    if all(value is None for value in segments.values()):
        raise ValueError(
            f"--attention {needs_segments[0]} on {name}, a plain model, which says nothing of segments; give "
            "--segment-size or --num-segments"
        )
    from hici.config import HiCIConfig
    from hici.models.attach import attach
    from hici.models.modes import set_attention

    model = load_plain_model(name, dtype, device_map)
    # no slots, so the modules are never used: as small as can be
    small = HiCIConfig(
        num_local_slots=1,
        num_global_slots=1,
        num_heads=1,
        bottleneck_dim=1,
        compress_dim=1,
        use_global=False,
        use_local=False,
        visibility="past",  # without slots all are alike, and this one generates in bounded memory
        **segments,
    )
    attach(model, small)
    set_attention(model, "full")
    return model
