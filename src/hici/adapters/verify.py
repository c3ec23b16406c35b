"""verify: what is right and wrong with a directory, without loading the base's weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hici.adapters.base_files import BaseFiles
from hici.adapters.contents import (
    Contents,
    config_of,
    is_adapter_directory,
    is_lora_name,
    is_module_name,
    read_contents,
)
from hici.adapters.hub import context_of_name, find_directory
from hici.adapters.load import base_name
from hici.adapters.plan import check_rank, make_plan
from hici.adapters.weights import bad_values
from hici.adapters.write import TOKENIZER_FILES
from hici.config import HiCIConfig
from hici.core.global_integration import GlobalIntegrator
from hici.core.local_construction import LocalConstructor
from hici.models.architectures.base import is_hici_name
from hici.models.load import first_line, load_config, meta_model, tokenizer_size
from hici.models.merged import AUTO_CLASSES, is_merged_directory, merged_class

OK, PROBLEM, UNKNOWN = "ok", "problem", "not checked"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at. `status`: "ok", "problem" or "not checked"."""

    name: str
    status: str
    text: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found. `kind`: "hici", "released", "longlora", "merged", "plain", or "unreadable"."""

    directory: str
    kind: str
    checks: list[Check]

    @property
    def problems(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == PROBLEM]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "problems": len(self.problems)}


def verify(
    directory: str | Path,
    *,
    base_model: str | Path | None = None,
    context_length: int | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
    revision: str | None = None,
) -> Report:
    """Check an adapter (ours, released, LongLoRA's) or a merged model: complete, shapes, NaN, rope, tokenizer.

    Of the base only config.json is read, where it can be had; without it names and shapes are checked against each
    other, and the report says so.

    Raises:
        ValueError: no such directory. Everything else is in the report.
    """
    path = find_directory(directory, revision)
    name = str(directory)
    if is_adapter_directory(path):
        return _verify_adapter(path, name, base_model, context_length, config)
    if not (path / "config.json").is_file():
        raise ValueError(f"{directory} has neither hici_config.json, trainable_params.bin nor config.json, so it holds "
                         "no model; check the path")  # fmt: skip
    return _verify_model(path, name)


def _verify_adapter(
    path: Path,
    name: str,
    base_model: str | Path | None,
    context_length: int | None,
    config: HiCIConfig | dict[str, Any] | None,
) -> Report:
    try:
        contents = read_contents(path, name, data=False)
    except ValueError as error:
        return Report(name, "unreadable", [Check("files", PROBLEM, str(error))])
    kind = contents.layout if contents.has_hici else "longlora"
    counts = (f"{len(contents.hici)} HiCI tensors, {len(contents.lora)} of LoRA, {len(contents.saved)} trained whole, "
              f"{sum(t.numel() for t in contents.tensors.values()):,} numbers")  # fmt: skip
    checks = [Check("files", OK, counts), _try("complete", lambda: _complete(contents, config))]
    checks.append(_try("values", lambda: _values(path, name)))
    checks.append(_try("rope", lambda: _rope(contents, context_length)))
    checks.append(_against_base(contents, base_model, context_length, config))
    rows = _embedding_rows(contents)
    checks.append(_try("tokenizer", lambda: _tokenizer(path, rows, "loading takes the base's")))
    return Report(name, kind, checks)


def _verify_model(path: Path, name: str) -> Report:
    """A model directory of transformers, with or without HiCI modules."""
    kind = "merged" if is_merged_directory(path) else "plain"
    try:
        model_config = load_config(str(path))
        meta = _merged_on_meta(model_config) if kind == "merged" else meta_model(model_config)
        files = BaseFiles(path, meta)
    except ValueError as error:
        return Report(name, kind, [Check("files", PROBLEM, str(error))])
    rope = f"{model_config.rope_parameters}, {model_config.max_position_embeddings:,} positions"
    without = "give one before generating text"
    return Report(name, kind, [
        _try("complete", lambda: _all_there(meta, files, path)),
        _try("values", lambda: _all_finite(files)),
        Check("rope", OK, rope),
        _try("tokenizer", lambda: _tokenizer(path, model_config.vocab_size, without)),
    ])  # fmt: skip


def _merged_on_meta(model_config: Any) -> Any:
    with torch.device("meta"):
        return merged_class(model_config)(model_config)


def _all_there(meta: Any, files: BaseFiles, path: Path) -> tuple[str, str]:
    auto_map = getattr(meta.config, "auto_map", None) or {}
    # a reference with -- names another repository
    code = {f"{auto_map[name].split('.')[0]}.py" for name in AUTO_CLASSES if "--" not in auto_map.get(name, "--")}
    gone = sorted(file for file in code if not (path / file).is_file())
    if gone:
        raise ValueError(f"config.json names the code {', '.join(gone)}, which is not there; copy it again")
    expected = dict(meta.named_parameters())
    wrong = [n for n, p in expected.items() if n not in files or files.get(n).shape != p.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} weights missing or of another shape: {', '.join(wrong[:4])}")
    return OK, f"{len(expected)} weights of a {type(meta).__name__}"


def _all_finite(files: BaseFiles) -> tuple[str, str]:
    bad = [name for name in files.file_names if bad_values({name: files.get(name)})]
    if bad:
        raise ValueError(f"NaN or infinity in {len(bad)} tensors: {', '.join(bad[:4])}")
    return OK, "no NaN, no infinity"


def _try(name: str, check: Any) -> Check:
    try:
        status, text = check()
    except ValueError as error:
        return Check(name, PROBLEM, str(error))
    return Check(name, status, text)


def _complete(contents: Contents, config: HiCIConfig | dict[str, Any] | None) -> tuple[str, str]:
    """Every layer holds the same; the modules have just the tensors that their shapes ask for."""
    check_rank(contents)
    layers: dict[int, dict[str, list[int]]] = {}
    for name, tensor in contents.tensors.items():
        if found := re.search(r"\.layers\.(\d+)\.(.*)", name):
            layers.setdefault(int(found.group(1)), {})[found.group(2)] = list(tensor.shape)
    if sorted(layers) != list(range(len(layers))):
        gone = sorted(set(range(max(layers) + 1)) - set(layers))
        raise ValueError(f"nothing of layers {gone[:8]} is there (missing); copy the files again")
    in_all = _in_all_layers(contents)
    every = {name: shape for layer in layers.values() for name, shape in layer.items() if in_all(name)}
    for number, layer in layers.items():
        for name, shape in every.items():
            if layer.get(name) != shape:
                what = "missing" if name not in layer else f"shape {layer[name]} instead of {shape}"
                raise ValueError(f"layers.{number}.{name}: {what} (other layers have it); copy the files again")
    if contents.has_hici:
        _compare_modules(config_of(contents, config), every)
    pairs = {name.replace(".lora_A.", ".lora_B.") for name in contents.lora} - contents.lora.keys()
    if pairs:
        raise ValueError(f"{min(pairs)} is missing beside its .lora_A.; copy the files again")
    return OK, f"{len(layers)} layers, all alike"


def _in_all_layers(contents: Contents) -> Callable[[str], bool]:
    """Whether a tensor of one layer must be in the others too: HiCI, norms, and LoRA where its config treats layers
    alike; other weights were trained in the layers that somebody chose."""
    lora_config = contents.lora_config or {}
    by_layer = any(lora_config.get(key) for key in ("rank_pattern", "layers_to_transform", "layers_pattern"))

    def in_all(name: str) -> bool:
        return not by_layer if is_lora_name(name) else is_hici_name("." + name) or "norm" in name

    return in_all


def _compare_modules(config: HiCIConfig, layer: dict[str, list[int]]) -> None:
    """One layer's HiCI tensors against modules built from the shapes that they show."""
    memory_slots = next(name for name in layer if name.endswith("local_constructor.memory_slots"))
    prefix, width = memory_slots.removesuffix("local_constructor.memory_slots"), layer[memory_slots][1]
    meta = torch.device("meta")
    modules = {
        "local_constructor": LocalConstructor(width, config.num_local_slots, config.num_heads,
                                              config.bottleneck_dim, device=meta),
        "global_integrator": GlobalIntegrator(width, config.num_global_slots, config.num_heads,
                                              config.global_width, config.compress_dim, device=meta),
    }  # fmt: skip
    expected = {f"{prefix}{module}.{name}": list(tensor.shape) for module, made in modules.items()
                for name, tensor in made.state_dict().items()}  # fmt: skip
    found = {name: shape for name, shape in layer.items() if is_module_name("." + name)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing in every layer; copy the files again")
        if name not in expected:
            raise ValueError(f"{name} is left over: the modules have no such tensor; copy the files again")
        if found[name] != expected[name] and not (name.endswith("expand_scale_param") and found[name] == [1]):
            raise ValueError(f"{name}: shape {found[name]} instead of {expected[name]}; copy the files again")


def _values(path: Path, name: str) -> tuple[str, str]:
    read_contents(path, name)  # raises on NaN, and on data that its header promised and is not there
    return OK, "no NaN, no infinity"


def _rope(contents: Contents, context_length: int | None) -> tuple[str, str]:
    record = contents.record
    if record is None:
        context = context_length or context_of_name(contents.name)
        if context is None:
            return UNKNOWN, ("no file of the released format holds the context, and the name does not end like -16k: "
                             "loading will ask for context_length")  # fmt: skip
        return OK, f"context of {context:,} tokens, {'given' if context_length else 'by its name'}"
    if record.context_length > record.max_position_embeddings:
        raise ValueError(f"hici_config.json: context_length={record.context_length} is more than "
                         f"max_position_embeddings={record.max_position_embeddings}; copy the file again")  # fmt: skip
    return OK, f"context of {record.context_length:,} tokens, {record.rope_parameters}"


def _against_base(
    contents: Contents,
    base_model: str | Path | None,
    context_length: int | None,
    config: HiCIConfig | dict[str, Any] | None,
) -> Check:
    """Names and shapes on the base's config.json, rope and vocabulary too."""
    try:
        base = base_name(contents, base_model)
        model_config = load_config(base)
    except ValueError as error:
        status = UNKNOWN if base_model is None else PROBLEM
        return Check("base", status, f"the base's config.json could not be read ({first_line(error)})")
    if contents.record is None and context_length is None and context_of_name(contents.name) is None:
        context_length = model_config.max_position_embeddings  # for names and shapes any context does
    return _try("base", lambda: (OK, _fits(contents, model_config, context_length, config)))


def _fits(contents: Contents, model_config: Any, context_length: int | None, config: Any) -> str:
    plan = make_plan(contents, model_config, context_length=context_length, config=config)
    return (f"every name and shape fits {model_config.name_or_path} ({model_config.model_type}); "
            f"{plan.vocab_size - model_config.vocab_size} new entries in the vocabulary")  # fmt: skip


def _embedding_rows(contents: Contents) -> int | None:
    rows = [
        int(t.shape[0]) for n, t in contents.saved.items() if n.endswith(("embed_tokens.weight", "embed_in.weight"))
    ]
    if rows:
        return rows[0]
    return contents.record.vocab_size if contents.record is not None else None


def _tokenizer(path: Path, rows: int | None, without: str) -> tuple[str, str]:
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return UNKNOWN, f"there is none here: {without}"
    size = tokenizer_size(path)
    if rows is None:
        return OK, f"{size:,} entries (the embeddings are the base's)"
    if size > rows:
        raise ValueError(f"the tokenizer has {size:,} entries, but the embeddings have {rows:,} rows; copy the "
                         "tokenizer that belongs to it")  # fmt: skip
    return OK, f"{size:,} entries for {rows:,} rows of embeddings"
