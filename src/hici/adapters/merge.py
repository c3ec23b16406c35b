"""merge: an adapter folded into its base, one tensor at a time, so that a 7B model needs no 7B of memory.

    W' = W + s B A                              where LoRA is, in the HiCI modules too
    W' = the trained tensor                     embeddings, norms
    W' = W and mean rows of W                   the output layer of a grown vocabulary

"plain" is a standard model for any engine. "hici" keeps the modules and carries the file that lets transformers'
AutoModel build them.
"""

from __future__ import annotations

import copy
import dataclasses
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

from hici.adapters.base_files import BaseFiles, base_directory, files_fingerprints
from hici.adapters.card import merged_card
from hici.adapters.contents import read_contents
from hici.adapters.hub import find_directory
from hici.adapters.load import base_name, check_fingerprint
from hici.adapters.plan import Plan, make_plan
from hici.adapters.weights import refuse_bad_values
from hici.adapters.write import copy_tokenizer
from hici.config import HiCIConfig
from hici.files import atomic_directory, check_target, read_json, refuse_sources, write_json, write_text
from hici.models.architectures import get_architecture
from hici.models.architectures.base import is_hici_name
from hici.models.load import floating_dtype, load_config, meta_model, stable_name
from hici.models.lookup import HICI
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
    dtype: torch.dtype | str | None = None,
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
    dtype = floating_dtype(dtype)
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} is below 1 byte; give a size like '2GB'")
    target = Path(target).expanduser()
    check_target(target, overwrite=overwrite, marker=MERGE_FILE)
    contents = read_contents(find_directory(adapter, revision), str(adapter))
    name = base_name(contents, base_model)
    directory = base_directory(name)
    refuse_sources(target, contents.directory, directory)
    base_config = load_config(str(directory))
    _refuse_quantised(base_config, name)
    plan = make_plan(contents, base_config, context_length=context_length, config=config)
    if kind == "hici" and plan.hici is None:
        raise ValueError(f"{adapter} holds no HiCI modules (a LongLoRA adapter), so there are none to keep; merge it "
                         "as plain")  # fmt: skip
    _refuse_other_lora(plan)
    mode = _attention(attention, plan, kind)
    sources = _sources(directory, name, base_config, plan)
    job = Job(plan, sources, kind, dtype or sources.dtype(), cast_all=dtype is not None)
    job.check(base_config.vocab_size)
    with atomic_directory(target, overwrite=overwrite, marker=MERGE_FILE) as temporary:
        _write_weights(temporary, job, max_shard_size, progress)
        _write_config(temporary, job, base_config, mode)
        _write_tokenizer(temporary, [contents.directory, directory], plan.context_length)
        if (directory / "generation_config.json").is_file():
            write_json(temporary / "generation_config.json", read_json(directory / "generation_config.json"))
        _write_about(temporary, job, target.name, str(adapter), stable_name(name), mode)
    return target


@dataclasses.dataclass(frozen=True)
class Job:
    """What a merge makes.

    Attributes:
        dtype: the merged model's; with `cast_all` of every tensor, else each of the base's keeps its own.
    """

    plan: Plan
    sources: BaseFiles
    kind: str
    dtype: torch.dtype
    cast_all: bool

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of all tensors that are written, by their names in the model."""
        shapes = {n: s for n, s in self.plan.shapes.items() if self.kind == "hici" or not is_hici_name(n)}
        if self.plan.head is not None:  # tied in the base, and no longer
            shapes[f"{self.plan.head}.weight"] = shapes[self._embedding()]
        return shapes

    def _embedding(self) -> str:
        architecture = get_architecture(self.sources.model_type)
        return next(name for name in self.plan.shapes if name.endswith(f"{architecture.embeddings}.weight"))

    def _is_embedding(self, name: str) -> bool:
        """Whether a trained tensor is the trained embedding once more (PEFT writes a tied head so)."""
        embedding = self.plan.contents.tensors.get(self._embedding())
        if embedding is None or not self.plan.tied or self.plan.head is not None:
            return False
        return torch.equal(self.plan.contents.tensors[name], embedding)

    def source(self, name: str) -> Tensor | None:
        """The base's own tensor of that name; None: it has none."""
        if self.plan.head is not None and name == f"{self.plan.head}.weight" and name not in self.sources:
            name = self._embedding()
        return self.sources.get(name) if name in self.sources else None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written."""
        source = None if self.cast_all else self.source(name)
        return self.dtype if source is None else source.dtype

    def file_name(self, name: str) -> str:
        """The name in the merged files. plain: the base's own, which its readers know; hici: the class's, since
        transformers translates old names for its own classes only."""
        return name if self.kind == "hici" else self.sources.file_names.get(name, name)

    def check(self, base_vocabulary: int) -> None:
        """Raise ValueError when the base lacks a tensor, or a trained one has no place in what is written."""
        shapes, contents = self.shapes, self.plan.contents
        rows = {self._embedding(), *(n for n in shapes if n.startswith(("lm_head.", f"{self.plan.head}.")))}
        for name, shape in shapes.items():
            if name in contents.tensors:
                continue
            source = self.source(name)
            if source is None:
                raise ValueError(f"{self.sources.directory} lacks {name}, a weight of the model; give complete weights")
            found = list(source.shape)
            grows = name in rows and found == [base_vocabulary, *shape[1:]] and shape[0] == self.plan.vocab_size
            if found != shape and not grows:
                raise ValueError(f"{self.sources.directory}: {name} has shape {found} instead of {shape}; give the "
                                 "weights that belong to its config.json")  # fmt: skip
        folded = {f"{module}.lora_{part}.weight" for module in self.plan.scaling for part in "AB"
                  if f"{module}.weight" in shapes}  # fmt: skip
        written = shapes.keys() | folded
        lost = [name for name in contents.tensors if name not in written
                and not (self.kind == "plain" and is_hici_name(name)) and not self._is_embedding(name)]  # fmt: skip
        if lost:
            raise ValueError(f"{contents.directory}: {len(lost)} trained tensors have no place in the merged model "
                             f"({', '.join(sorted(lost)[:4])}); load it and use PEFT's merge_and_unload")  # fmt: skip


def _sources(directory: Path, name: str, base_config: Any, plan: Plan) -> BaseFiles:
    """The base's weights, if they are those that the adapter was made on."""
    meta = meta_model(base_config)
    sources = BaseFiles(directory, meta, drop_modules=plan.hici is not None)
    record = plan.contents.record
    if record is not None:
        found = files_fingerprints(sources, meta)
        if record.base_fingerprint not in found:
            check_fingerprint(found[0], plan.contents, name)
    return sources


def _write_weights(directory: Path, job: Job, max_shard_size: int | str, progress: Progress | None) -> None:
    """Shard after shard, each tensor made when its shard is written."""
    shapes = job.shapes
    stored = {job.file_name(name): name for name in shapes}
    empty = {file_name: torch.empty(shapes[name], dtype=job.dtype_of(name), device="meta")
             for file_name, name in stored.items()}  # fmt: skip
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size,
                                                filename_pattern="model{suffix}.safetensors")  # fmt: skip
    done, rounded = 0, 0
    for file, file_names in shards.filename_to_tensors.items():
        tensors = {}
        for file_name in file_names:
            name = stored[file_name]
            exact = _merged_tensor(name, shapes[name], job)
            tensors[file_name] = exact.to(job.dtype_of(name)).contiguous()
            # what was trained whole; that sums with LoRA are rounded once goes without saying
            finer = torch.promote_types(exact.dtype, job.dtype_of(name)) != job.dtype_of(name)
            rounded += finer and name in job.plan.contents.tensors
            done += 1
            if progress is not None:
                progress(done, len(stored))
        refuse_bad_values(tensors, f"the merge in {job.dtype}")
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors
        gc.collect()
    if rounded:
        logger.warning("%d tensors that were trained in a finer dtype were rounded to %s; dtype=torch.float32 (--dtype "
                       "float32) keeps them exactly", rounded, job.dtype)  # fmt: skip
    if shards.is_sharded:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})  # fmt: skip


def _merged_tensor(name: str, shape: list[int], job: Job) -> Tensor:
    """One tensor of the merged model; where LoRA is, in float32."""
    contents = job.plan.contents
    trained = contents.tensors.get(name)
    if trained is not None:
        weight = trained.reshape(shape)  # the gate as [1] or []
    else:
        source = job.source(name)
        assert source is not None  # Job.check
        weight = source if list(source.shape) == shape else grown_rows(source, shape[0])
    module = name.removesuffix(".weight")
    if name.endswith(".weight") and module in job.plan.scaling:
        a_rD, b_Cr = (contents.tensors[f"{module}.lora_{part}.weight"].float() for part in "AB")
        weight = torch.addmm(weight.float(), b_Cr, a_rD, alpha=job.plan.scaling[module])
    return weight


def _write_config(directory: Path, job: Job, base_config: Any, attention: str) -> None:
    plan = job.plan
    config = copy.deepcopy(base_config)
    config_rope_parameters(config, plan.rope_parameters, plan.positions)
    config.vocab_size = plan.vocab_size
    values = config.to_diff_dict()
    for key in ("_name_or_path", "hici", "auto_map", "quantization_config"):
        values.pop(key, None)
    parent, short = type(meta_model(base_config)).__name__, str(job.dtype).removeprefix("torch.")
    values |= {
        "architectures": [parent],
        # even where they are the class's defaults: other readers have others
        "rope_parameters": plan.rope_parameters,
        "max_position_embeddings": plan.positions,
        "vocab_size": plan.vocab_size,
        "tie_word_embeddings": plan.tied and plan.head is None,
        "dtype": short,
    }
    values |= _for_older_readers(plan.rope_parameters, short)
    if job.kind == "hici":
        assert plan.hici is not None  # merge
        values["hici"] = {**plan.hici.to_dict(), "attention": attention}
        values["auto_map"] = dict.fromkeys(AUTO_CLASSES, f"{Path(REMOTE_FILE).stem}.{parent}")
        write_text(directory / REMOTE_FILE, remote_code(parent))
    write_json(directory / "config.json", json.loads(json.dumps(values, default=str)))


def _write_about(directory: Path, job: Job, title: str, adapter: str, base: str, attention: str) -> None:
    """The model card, and how the merge was made."""
    plan, record = job.plan, job.plan.contents.record
    hici = None if plan.hici is None else plan.hici.to_dict()
    write_text(directory / "README.md", merged_card(
        title, job.kind, base, hici, plan.context_length, plan.rope_parameters, attention,
        record.training if record else None,
    ))  # fmt: skip
    write_json(directory / MERGE_FILE, {
        "kind": job.kind, "adapter": adapter, "base_model": base, "context_length": plan.context_length,
        "hici": hici, "attention": attention, "dtype": str(job.dtype).removeprefix("torch."),
        "made_with": provenance(),
    })  # fmt: skip


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
    if not special:
        special = [name for name in plan.contents.lora if not name.endswith((".lora_A.weight", ".lora_B.weight"))][:1]
    if special:
        said = ", ".join(f"{key}={values[key]}" if key in values else key for key in special)
        raise ValueError(
            f"{plan.contents.directory}: LoRA with {said} is more than W + s B A, which is all that merge folds; load "
            "it and use PEFT's merge_and_unload"
        )
