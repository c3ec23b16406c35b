"""merge: an adapter folded into its base, one tensor at a time, so that a 7B model needs no 7B of memory.

    W' = W + s B A                              where LoRA is, in the HiCI modules too
    W' = the trained tensor                     embeddings, norms
    W' = W and mean rows of W                   the output layer of a grown vocabulary

"plain" is a standard model for any engine. "hici" keeps the modules and carries the file that lets transformers'
AutoModel build them.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from hici.adapters.base_files import BaseFiles, base_directory
from hici.adapters.card import merged_card
from hici.adapters.contents import read_contents
from hici.adapters.hub import find_directory
from hici.adapters.load import base_name
from hici.adapters.plan import Plan, make_plan
from hici.adapters.write import copy_tokenizer
from hici.config import HiCIConfig
from hici.files import atomic_directory, check_target, read_json, write_json, write_text
from hici.models.architectures.base import is_hici_name
from hici.models.bridge import HICI
from hici.models.load import load_config, meta_model
from hici.models.merged import AUTO_CLASSES, REMOTE_FILE, remote_code
from hici.models.modes import ATTENTIONS
from hici.models.vocabulary import grown_rows
from hici.provenance import provenance
from hici.registry import suggest
from hici.rope import config_rope_parameters

logger = logging.getLogger(__name__)

KINDS = ("plain", "hici")
MERGE_FILE = "hici_merge.json"  # how it was made; only a directory that holds it is ever replaced

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)

_ROPES_OF_OLD = ("default", "linear", "yarn", "llama3")

# settings of a LoRA config with which s B A is what PEFT adds
_FOLDABLE = {
    "auto_mapping", "alpha_pattern", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def merge(
    adapter: str | Path,
    target: str | Path,
    kind: str = "plain",
    *,
    base_model: str | Path | None = None,
    context_length: int | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
    attention: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fold an adapter (ours, released, LongLoRA's) into its base and write a model directory, atomically.

    Args:
        adapter: a directory or a hub name.
        target: new or empty, unless `overwrite`.
        kind: "plain" (no HiCI modules; stock transformers and any engine) or "hici" (with them).
        base_model, context_length, config, revision: as in `hici.from_pretrained`.
        attention: mode in which a "hici" directory starts; None: as the adapter was saved ("hici" when nothing says).
        dtype: of the merged weights; None: the base's own. Sums are made in float32.
        max_shard_size: of one safetensors file, which is also about the memory that is needed.
        progress: called after each tensor.

    Returns:
        `target`.

    Raises:
        ValueError: all that `from_pretrained` refuses; a quantised base; LoRA that is not W + s B A (DoRA, ...);
            `target` exists. Nothing on disk has changed then.
    """
    if kind not in KINDS:
        raise ValueError(suggest(str(kind), KINDS, "kind of merge"))
    target = Path(target).expanduser()
    check_target(target, overwrite=overwrite, marker=MERGE_FILE)
    contents = read_contents(find_directory(adapter, revision), str(adapter))
    name = base_name(contents, base_model)
    directory = base_directory(name)
    _refuse_own_source(target, contents.directory, directory)
    base_config = load_config(str(directory))
    _refuse_quantised(base_config, name)
    plan = make_plan(contents, base_config, context_length=context_length, config=config)
    if kind == "hici" and plan.hici is None:
        raise ValueError(f"{adapter} holds no HiCI modules (a LongLoRA adapter), so there are none to keep; merge it "
                         "as plain")  # fmt: skip
    _refuse_other_lora(plan)
    mode = _attention(attention, plan, kind)
    meta = meta_model(base_config)
    sources = BaseFiles(directory, meta)
    shapes = {n: shape for n, shape in plan.shapes.items() if kind == "hici" or not is_hici_name(n)}
    _refuse_gaps(shapes, plan, sources)
    main_dtype = dtype or sources.dtype()
    with atomic_directory(target, overwrite=overwrite, marker=MERGE_FILE) as temporary:
        _write_weights(temporary, shapes, plan, sources, dtype, main_dtype, max_shard_size, progress)
        _write_config(temporary, plan, base_config, type(meta).__name__, main_dtype, mode if kind == "hici" else None)
        _write_tokenizer(temporary, [contents.directory, directory], plan.context_length)
        if (directory / "generation_config.json").is_file():
            write_json(temporary / "generation_config.json", read_json(directory / "generation_config.json"))
        record = contents.record
        stable = name if not Path(name).is_dir() else str(Path(name).resolve())
        hici = None if plan.hici is None else plan.hici.to_dict()
        card = merged_card(target.name, kind, stable, hici, plan.context_length, plan.rope_parameters, mode,
                           record.training if record else None)  # fmt: skip
        write_text(temporary / "README.md", card)
        write_json(temporary / MERGE_FILE, {
            "kind": kind, "adapter": str(adapter), "base_model": stable, "context_length": plan.context_length,
            "hici": hici, "attention": mode, "dtype": str(main_dtype).removeprefix("torch."),
            "made_with": provenance(),
        })  # fmt: skip
    return target


def _write_weights(
    directory: Path,
    shapes: dict[str, list[int]],
    plan: Plan,
    sources: BaseFiles,
    dtype: torch.dtype | None,
    main_dtype: torch.dtype,
    max_shard_size: int | str,
    progress: Progress | None,
) -> None:
    """Shard after shard, each tensor made when its shard is written."""
    # plain: the base's own names, which its readers know; hici: the class's names, since transformers translates old
    # ones for its own classes only
    keeps = any(is_hici_name(name) for name in shapes)
    stored = {name if keeps else sources.file_names.get(name, name): name for name in shapes}

    def dtype_of(name: str) -> torch.dtype:
        return dtype or (sources.get(name).dtype if name in sources else main_dtype)

    empty = {file_name: torch.empty(shapes[name], dtype=dtype_of(name), device="meta")
             for file_name, name in stored.items()}  # fmt: skip
    plan_of_shards = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size,
                                                        filename_pattern="model{suffix}.safetensors")  # fmt: skip
    done = 0
    for file, file_names in plan_of_shards.filename_to_tensors.items():
        tensors = {}
        for file_name in file_names:
            name = stored[file_name]
            tensors[file_name] = _merged_tensor(name, shapes[name], plan, sources).to(dtype_of(name)).contiguous()
            done += 1
            if progress is not None:
                progress(done, len(stored))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors
        gc.collect()
    if plan_of_shards.is_sharded:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": plan_of_shards.metadata, "weight_map": plan_of_shards.tensor_to_filename})  # fmt: skip


def _merged_tensor(name: str, shape: list[int], plan: Plan, sources: BaseFiles) -> Tensor:
    contents = plan.contents
    trained = contents.tensors.get(name)
    if trained is not None:
        weight = trained.reshape(shape)  # the gate as [1] or []
    else:
        weight = sources.get(name)
        if list(weight.shape) != shape:
            weight = grown_rows(weight, shape[0])
    module = name.removesuffix(".weight")
    if name.endswith(".weight") and module in plan.scaling:
        a_rD, b_Cr = (contents.tensors[f"{module}.lora_{part}.weight"].float() for part in "AB")
        weight = torch.addmm(weight.float(), b_Cr, a_rD, alpha=plan.scaling[module])
    return weight


def _write_config(
    directory: Path, plan: Plan, base_config: Any, parent: str, dtype: torch.dtype, attention: str | None
) -> None:
    """config.json; `attention`: the mode of a model that keeps its modules, None for a plain one."""
    config = copy.deepcopy(base_config)
    config_rope_parameters(config, plan.rope_parameters, plan.positions)
    config.vocab_size = plan.vocab_size
    values = config.to_diff_dict()
    for key in ("_name_or_path", "hici", "auto_map", "quantization_config"):
        values.pop(key, None)
    short = str(dtype).removeprefix("torch.")
    values |= {
        "architectures": [parent],
        # even where they are the class's defaults: other readers have others
        "rope_parameters": plan.rope_parameters,
        "max_position_embeddings": plan.positions,
        "vocab_size": plan.vocab_size,
        "dtype": short,
    }
    values |= _for_older_readers(plan.rope_parameters, short)
    if attention is not None:
        assert plan.hici is not None  # merge
        values["hici"] = {**plan.hici.to_dict(), "attention": attention}
        values["auto_map"] = dict.fromkeys(AUTO_CLASSES, f"{Path(REMOTE_FILE).stem}.{parent}")
        write_text(directory / REMOTE_FILE, remote_code(parent))
    write_json(directory / "config.json", json.loads(json.dumps(values, default=str)))


def _for_older_readers(rope: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same under the names of transformers 4, which many engines read: rope would be unscaled there otherwise."""
    if rope.get("rope_type") not in _ROPES_OF_OLD or "partial_rotary_factor" in rope:
        return {"torch_dtype": dtype}  # no common form of it: every family had its own
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old = {"torch_dtype": dtype, "rope_theta": rope["rope_theta"]}
    return old if rope["rope_type"] == "default" else {**old, "rope_scaling": scaling}


def _write_tokenizer(directory: Path, sources: list[Path], context_length: int) -> None:
    """The first source's tokenizer, its length raised to the context."""
    for source in sources:
        if copy_tokenizer(source, directory):
            break
    else:
        _tell_no_tokenizer(directory, sources)
        return
    file = directory / "tokenizer_config.json"
    if file.is_file():
        values = read_json(file)
        if isinstance(values.get("model_max_length"), (int, float)) and values["model_max_length"] < context_length:
            write_json(file, {**values, "model_max_length": context_length})


def _tell_no_tokenizer(directory: Path, sources: list[Path]) -> None:
    logger.warning(
        "neither %s has a tokenizer, so the merged directory has none: put its files there before generating text",
        " nor ".join(str(source) for source in sources),
    )


def _attention(given: str | None, plan: Plan, kind: str) -> str:
    if given is not None and kind == "plain":
        raise ValueError(f"attention={given} with a plain merge, which has no modes; leave it out")
    if given is not None and given not in ATTENTIONS:
        raise ValueError(suggest(given, ATTENTIONS, "attention"))
    record = plan.contents.record
    return given or (record.attention if record is not None else HICI)


def _refuse_own_source(target: Path, *sources: Path) -> None:
    for source in sources:
        if target.resolve() == source.resolve():
            raise ValueError(f"{target} is what is read, and cannot be what is written; give another directory")


def _refuse_quantised(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the base {name!r} is quantised, and LoRA can't be folded into its packed weights; give the "
                         "base in float16, bfloat16 or float32 with base_model= (--base-model)")  # fmt: skip


def _refuse_other_lora(plan: Plan) -> None:
    config = plan.lora_config()
    if config is None:
        return
    plain, values = type(config)().to_dict(), config.to_dict()
    special = [key for key, value in values.items() if key not in _FOLDABLE and value != plain.get(key)]
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        special.append("init_lora_weights")  # PiSSA and its like change the base's weights
    if special:
        raise ValueError(
            f"{plan.contents.directory}: LoRA with {', '.join(f'{key}={values[key]}' for key in special)} is more "
            "than W + s B A, which is all that merge folds; load it and use PEFT's merge_and_unload"
        )


def _refuse_gaps(shapes: dict[str, list[int]], plan: Plan, sources: BaseFiles) -> None:
    lost = [name for name in shapes if name not in plan.contents.tensors and name not in sources]
    if lost:
        raise ValueError(f"{sources.directory} lacks {len(lost)} weights of the model ({', '.join(sorted(lost)[:4])}); "
                         "give complete weights")  # fmt: skip
    for name, shape in shapes.items():
        if name in sources and name not in plan.contents.tensors:
            found = list(sources.get(name).shape)
            grows = found[1:] == shape[1:] and found[0] < shape[0] == plan.vocab_size
            if found != shape and not grows:
                raise ValueError(f"{sources.directory}: {name} has shape {found} instead of {shape}; give the weights "
                                 "that belong to its config.json")  # fmt: skip
