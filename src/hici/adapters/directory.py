"""Our adapter directory: written whole, read completely or not at all.

adapter_config.json, adapter_model.safetensors   PEFT's part: LoRA, embeddings, norms (absent without LoRA)
hici_model.safetensors                           HiCI modules under their published names
hici_config.json                                 HiCIConfig, context, rope, base model, attention mode, versions
tokenizer files, README.md
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hici.adapters.card import model_card
from hici.config import HiCIConfig
from hici.files import atomic_directory, check_target, read_json, write_json, write_text
from hici.models.architectures.base import is_hici_name
from hici.models.attach import (
    attach,
    attention_mode,
    detach,
    get_causal_lm,
    get_decoder,
    hici_config,
    hici_state_dict,
    is_attached,
    is_peft,
    write_config,
)
from hici.models.bridge import FULL, HICI
from hici.models.fingerprint import base_checksums, base_fingerprint, changed_tensors
from hici.models.modes import set_attention
from hici.provenance import provenance
from hici.registry import suggest
from hici.rope import config_rope_parameters, set_rope

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "hici_config.json"
HICI_FILE = "hici_model.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
ATTENTIONS = (FULL, HICI)


@dataclasses.dataclass(frozen=True)
class Record:
    """What hici_config.json holds. `attention`: the mode at saving, which is the one trained in when the training ends
    with saving; `peft`: PEFT's two files belong to it."""

    hici: dict[str, Any]
    attention: str
    context_length: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    base_model: str
    base_model_type: str
    base_fingerprint: str
    peft: bool
    made_with: dict[str, Any]
    format_version: int = FORMAT_VERSION


def save_pretrained(
    model: Any,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    context_length: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write everything trained into one directory, atomically (`hici.from_pretrained` reads it).

    Args:
        model: an attached model, plain (its base weights unchanged since `attach`) or wrapped by PEFT.
        directory: new or empty, unless `overwrite`.
        tokenizer: saved beside it when given.
        context_length: tokens that it was trained for; None: the positions of its rope.

    Raises:
        ValueError: nothing attached; base weights that changed or train outside of PEFT (they would be lost); a NaN or
            infinity; parameters sharded over processes; another PEFT adapter than one LoRA called "default"; a
            directory that is not empty, or with `overwrite` is not one of ours. Nothing on disk has changed then.
    """
    directory = Path(directory).expanduser()
    lm, peft = get_causal_lm(model), is_peft(model)
    config = hici_config(model)
    check_target(directory, overwrite=overwrite, marker=CONFIG_FILE)
    _refuse_unsavable(model)
    _refuse_losses(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in hici_state_dict(model).items()}
    _refuse_bad_values(tensors, "this model")
    record = Record(
        hici=config.to_dict(),
        attention=attention_mode(model),
        context_length=context_length or lm.config.max_position_embeddings,
        rope_parameters=dict(lm.config.rope_parameters),
        max_position_embeddings=lm.config.max_position_embeddings,
        base_model=_stable_name(lm.config.name_or_path),
        base_model_type=lm.config.model_type,
        base_fingerprint=get_decoder(model).hici_attached.base_fingerprint,
        peft=peft,
        made_with=provenance(),
    )
    with atomic_directory(directory, overwrite=overwrite, marker=CONFIG_FILE) as temporary:
        if peft:
            # plain PEFT reads the base's name from its own file
            model.peft_config["default"].base_model_name_or_path = record.base_model
            # False: embeddings are in modules_to_save; "auto" would ask the hub for the base's vocabulary
            model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False)
            _refuse_bad_values(load_file(temporary / PEFT_FILES[1]), "this model")
        save_file(tensors, temporary / HICI_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, dataclasses.asdict(record))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(record, str(directory)))
    write_config(model)
    return directory


def from_pretrained(
    directory: str | Path,
    base_model: Any = None,
    attention: str = "full",
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> Any:
    """The model that `save_pretrained` wrote: base, rope, HiCI modules, LoRA, embeddings and norms, in eval mode.

    Args:
        directory: what `save_pretrained` wrote.
        base_model: name or path of the base, or a plain loaded model (used in place). None: the recorded name.
        attention: "full" (the model's stock attention) or "hici".
        dtype, device_map: as in transformers' from_pretrained; None: the base's own dtype, CPU. Not with a loaded
            `base_model`, which has its own. `hici train` saves float32; on a bfloat16 base that is rounded (logged),
            and small changes of weights near 1, such as the norms', may vanish. `torch.float32` keeps all of it.

    Returns:
        A PeftModel where LoRA was saved, else the plain causal LM; nothing in it requires gradients.

    Raises:
        ValueError: a missing file; a tensor missing, left over, of another shape, NaN or infinite; another base; an
            unknown key. A loaded `base_model` is then as it was.
    """
    directory = Path(directory).expanduser()
    if attention not in ATTENTIONS:
        raise ValueError(suggest(str(attention), ATTENTIONS, "attention"))
    record = read_record(directory)
    tensors = _read_tensors(directory / HICI_FILE)
    peft_tensors = _read_tensors(directory / PEFT_FILES[1]) if record.peft else {}
    model = _base(base_model if base_model is not None else record.base_model, record, dtype, device_map, directory)
    _check_base(model, record, directory)
    rope_before = dict(model.config.rope_parameters), model.config.max_position_embeddings
    trained_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if rope_before != (record.rope_parameters, record.max_position_embeddings):
            set_rope(model, record.rope_parameters, record.max_position_embeddings)
        attach(model, HiCIConfig.from_dict(record.hici))
        _load_hici(model, tensors, directory / HICI_FILE)
        wrapped = _load_peft(model, peft_tensors, directory) if record.peft else model
    except BaseException:
        if is_attached(model):
            detach(model)
        set_rope(model, *rope_before)
        for parameter, trained in trained_before:  # PEFT froze them
            parameter.requires_grad_(trained)
        raise
    _tell_rounding({**tensors, **peft_tensors}, model.dtype, directory)
    set_attention(wrapped, attention)
    return wrapped.requires_grad_(False).eval()


def read_record(directory: str | Path) -> Record:
    """hici_config.json, checked: all files of the directory are there, no unknown key, a known format.

    Raises:
        ValueError: names the file or key.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that hici.save_pretrained wrote")
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory} has no {CONFIG_FILE}, so hici.save_pretrained did not write it whole; copy it "
                         "again, or give another directory")  # fmt: skip
    values = read_json(directory / CONFIG_FILE)
    if not isinstance(values, dict):
        raise ValueError(f"{directory / CONFIG_FILE} holds a {type(values).__name__} instead of keys and values; copy "
                         "the file again")  # fmt: skip
    known = [field.name for field in dataclasses.fields(Record)]
    for key in values:
        if key not in known:
            raise ValueError(f"{directory / CONFIG_FILE}: " + suggest(key, known, "key"))
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"{directory / CONFIG_FILE} lacks {', '.join(missing)}; copy the file again")
    kinds = {"str": str, "int": int, "bool": bool, "dict[str, Any]": dict}
    for field in dataclasses.fields(Record):
        if not isinstance(values[field.name], kinds[str(field.type)]):
            raise ValueError(f"{directory / CONFIG_FILE}: {field.name}={values[field.name]!r} is no {field.type}; copy "
                             "the file again")  # fmt: skip
    record = Record(**values)
    if record.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{directory / CONFIG_FILE} has format_version {record.format_version}, but this hici reads "
            f"{FORMAT_VERSION}; install the hici that wrote it ({record.made_with.get('hici')})"
        )
    _check_parts(record, directory)
    for name in (HICI_FILE, *(PEFT_FILES if record.peft else ())):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} lacks {name}; half a checkpoint is not loaded: copy the file again")
    return record


def _check_parts(record: Record, directory: Path) -> None:
    """The dicts inside the record are whole: a default in place of a lost value would load as another model."""
    file = directory / CONFIG_FILE
    for part, needed, values in (
        ("hici", [field.name for field in dataclasses.fields(HiCIConfig)], record.hici),
        ("rope_parameters", ["rope_type", "rope_theta"], record.rope_parameters),
    ):
        missing = [key for key in needed if key not in values]
        if missing:
            raise ValueError(f"{file}: {part} lacks {', '.join(missing)}; copy the file again")
    HiCIConfig.from_dict(record.hici)
    present = [name for name in PEFT_FILES if (directory / name).exists()]
    if present and not record.peft:
        raise ValueError(
            f"{file} says that the directory has no PEFT part, but {', '.join(present)} is there; take it away, or "
            f"copy {CONFIG_FILE} again"
        )


def _base(base_model: Any, record: Record, dtype: Any, device_map: Any, directory: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not isinstance(base_model, (str, Path)):
        if hasattr(base_model, "peft_config") or is_attached(base_model):
            raise ValueError("base_model is attached or wrapped already; give the plain base model or its name")
        if dtype is not None or device_map is not None:
            raise ValueError(
                f"dtype={dtype} and device_map={device_map} with a loaded base_model, which has both already; leave "
                "them out, or give the base's name"
            )
        return base_model
    if not str(base_model):
        raise ValueError(f"{directory} does not record the name of its base model; give base_model=")
    try:
        config = AutoConfig.from_pretrained(base_model)
        if config.model_type == record.base_model_type:
            config_rope_parameters(config, record.rope_parameters, record.max_position_embeddings)
        return AutoModelForCausalLM.from_pretrained(
            base_model, config=config, dtype=dtype if dtype is not None else "auto", device_map=device_map
        )
    except OSError as error:
        raise ValueError(
            f"the base model {str(base_model)!r} of {directory} could not be loaded ({error}); give base_model= a "
            "directory or hub name that holds it"
        ) from error


def _check_base(model: Any, record: Record, directory: Path) -> None:
    found = model.config.model_type, base_fingerprint(model)
    if "unknown" in (found[1], record.base_fingerprint):
        logger.warning(
            "the base of %s is quantised or without data: whether it is the right one is not checked", directory
        )
        found = found[0], record.base_fingerprint
    if found != (record.base_model_type, record.base_fingerprint):
        raise ValueError(
            f"{directory} was made on {record.base_model!r} ({record.base_model_type}, fingerprint "
            f"{record.base_fingerprint}), but this base is {model.config.name_or_path!r} ({found[0]}, {found[1]}); "
            "give the base that it was made on (a float32 base read as float16 rounds differently: then give another "
            "dtype)"
        )


def _load_hici(model: Any, tensors: dict[str, Tensor], file: Path) -> None:
    expected = hici_state_dict(model)
    if any(tensor.device.type == "meta" for tensor in expected.values()):
        raise ValueError("device_map keeps layers off every device (offload), where HiCI modules cannot be filled; "
                         "give a device_map that holds the whole model")  # fmt: skip
    check_tensors({name: tensor.shape for name, tensor in expected.items()}, tensors, file)
    # not strict: the base's own weights are not in the file; check_tensors compared every name of the HiCI part
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unexpected


def _load_peft(model: Any, tensors: dict[str, Tensor], directory: Path) -> Any:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    _check_lora_keys(directory / PEFT_FILES[0])
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{directory / PEFT_FILES[0]} is not a LoRA config ({error}); copy the file again") from error
    config.inference_mode = True
    config.base_model_name_or_path = model.config.name_or_path  # checked by its weights; PEFT would warn of a new path
    modules = dict(model.named_modules())
    try:
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        check_tensors({name: t.shape for name, t in expected.items()}, tensors, directory / PEFT_FILES[1])
    except BaseException:
        _unwrap(model, modules)
        raise
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped


def _unwrap(model: Any, modules: dict[str, nn.Module]) -> None:
    """Put the model's own modules back (PEFT's unload would leave its copies of embeddings and norms)."""
    for name, module in modules.items():
        if model.get_submodule(name) is not module:
            model.set_submodule(name, module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _check_lora_keys(file: Path) -> None:
    """PEFT itself ignores a key that it does not know and takes a default for one that is lost."""
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    values = read_json(file)
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: {suggest(key, known, 'key')} (a newer PEFT may have written it: install that)")
    missing = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in values]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; copy the file again")


def check_tensors(expected: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> None:
    """Raise ValueError unless `tensors` has exactly the expected names and shapes; lists what differs."""
    problems = [f"missing: {name}" for name in sorted(set(expected) - set(tensors))]
    problems += [f"left over: {name}" for name in sorted(set(tensors) - set(expected))]
    problems += [
        f"shape {list(tensors[name].shape)} instead of {list(expected[name])}: {name}"
        for name in sorted(set(tensors) & set(expected))
        if tensors[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(
            f"{file} does not fit the model, so nothing of it was loaded. {len(problems)} problems, first ones: "
            + "; ".join(problems[:8])
            + ". Give the config and base that it was saved with, or copy the file again"
        )


def _tell_rounding(tensors: dict[str, Tensor], dtype: torch.dtype, directory: Path) -> None:
    finer = [n for n, t in tensors.items() if t.is_floating_point() and torch.promote_types(t.dtype, dtype) != dtype]
    if finer:
        logger.warning(
            "%d of %d tensors of %s are finer than the base's %s and were rounded to it (%s, ...); dtype=torch.float32 "
            "keeps them exactly", len(finer), len(tensors), directory, dtype, finer[0],
        )  # fmt: skip


def _refuse_bad_values(tensors: dict[str, Tensor], where: str) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{where} holds NaN or infinity in {len(bad)} tensors ({', '.join(bad[:4])}); such weights are neither "
            "saved nor loaded: go back to an earlier checkpoint"
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy the file again") from error
    _refuse_bad_values(tensors, str(file))
    return tensors


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


def _stable_name(name: str) -> str:
    """A local base by its absolute path, so that the adapter loads from any working directory."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def tensor_shapes(file: str | Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file, read from its header."""
    with safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - not a dict
