"""`PeftModel.from_pretrained` for models that a drop-in module registered: a HiCI directory, completely or not at all.

Plain PEFT reads the LoRA file alone: `trainable_params.bin`, the vocabulary and rope stay out without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

from hici.adapters.contents import Contents, config_of, read_contents
from hici.adapters.file_names import HICI_FILE, LORA_FILE, PICKLED_LORA_FILE, RECORD_FILE, TRAINABLE_FILE
from hici.adapters.hub import context_of_name, find_directory, repository_kind
from hici.adapters.load import install
from hici.adapters.plan import make_plan
from hici.adapters.weights import tensor_shapes
from hici.dropin.modules import Registered, apply_constants, get_registered, positive_integer
from hici.models.architectures.base import is_hici_name
from hici.models.fingerprint import base_fingerprint
from hici.models.lookup import get_decoder, hici_config, is_peft
from hici.models.vocabulary import vocabulary_size

logger = logging.getLogger(__name__)

_MARK = "wrapped_by_hici_dropin"
# arguments of PeftModel.from_pretrained that are honoured; the dtype is the base's whatever autocast_adapter_dtype says
_KNOWN = ("cls", "model", "model_id", "adapter_name", "is_trainable", "autocast_adapter_dtype", "revision", "subfolder")
# fields of HiCIConfig under the names of register_hici_to_model
_REGISTER_NAMES = {
    "num_local_slots": "num_local_slots",
    "num_global_slots": "global_slots",
    "num_heads": "num_heads",
    "bottleneck_dim": "bottleneck_dim",
    "compress_dim": "shared_compress_dim",
    "global_width": "compress_dim",
}


def wrap_peft() -> None:
    """Wrap `PeftModel.from_pretrained`, once a process; subclasses inherit it.

    Every call goes through untouched but one: a registered base, and a directory with HiCI tensors in it.
    """
    from peft import PeftModel

    original = PeftModel.from_pretrained.__func__
    if _is_wrapped(original):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            call = signature.bind(cls, *args, **kwargs)
        except TypeError:  # the original says what is wrong
            return original(cls, *args, **kwargs)
        given = dict(call.arguments)
        given |= given.pop("kwargs", {})
        if get_registered(given["model"]) is not None:
            directory = _hici_directory(given)
            if directory is not None:
                _refuse_arguments(signature, given, directory)
                return _load(given["model"], directory, _name(given), bool(given.get("is_trainable", False)))
        return original(cls, *args, **kwargs)

    setattr(from_pretrained, _MARK, True)
    PeftModel.from_pretrained = classmethod(from_pretrained)


def _is_wrapped(function: Any) -> bool:
    while function is not None:
        if getattr(function, _MARK, False):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _name(given: dict[str, Any]) -> str:
    """What the user called the adapter."""
    parts = [str(given["model_id"]), given.get("subfolder")]
    return "/".join(part for part in parts if part)


def _hici_directory(given: dict[str, Any]) -> Path | None:
    """The local directory of the adapter, if it holds HiCI tensors (possibly damaged ones); None: leave it to PEFT."""
    model_id, subfolder, revision = str(given["model_id"]), given.get("subfolder") or "", given.get("revision")
    if not Path(model_id).expanduser().is_dir():
        if repository_kind(model_id, revision, subfolder) != "adapter":
            return None
    elif not _holds_hici(Path(model_id).expanduser() / subfolder):
        return None
    directory = find_directory(model_id, revision) / subfolder
    return directory if _holds_hici(directory) else None


def _holds_hici(directory: Path) -> bool:
    """Whether any file of a directory is ours, or names a HiCI tensor."""
    if (directory / RECORD_FILE).is_file() or (directory / HICI_FILE).is_file():
        return True
    names: set[str] = set()
    for file in (directory / PICKLED_LORA_FILE, directory / LORA_FILE):
        if file.is_file():
            # a damaged one is for PEFT to name, unless another file shows that it belongs to HiCI
            with contextlib.suppress(ValueError):
                names |= tensor_shapes(file).keys()
    if (directory / TRAINABLE_FILE).is_file():
        names |= tensor_shapes(directory / TRAINABLE_FILE).keys()  # PEFT has no such file: an error is ours to raise
    return any(is_hici_name(name) for name in names)


def _refuse_arguments(signature: inspect.Signature, given: dict[str, Any], directory: Path) -> None:
    holds = f"{directory} holds HiCI modules"
    adapter_name = given.get("adapter_name", "default")
    if adapter_name != "default":
        raise ValueError(f"adapter_name={adapter_name!r}, but {holds}, of which a model has one set; leave it out "
                         "('default')")  # fmt: skip
    for name, value in given.items():
        default = signature.parameters[name].default if name in signature.parameters else None
        if name not in _KNOWN and value is not None and value != default:
            raise ValueError(f"{name}={value!r}, but {holds}, whose loading does not know that argument; leave it out "
                             f"(known: {', '.join(_KNOWN[3:])})")  # fmt: skip
    if is_peft(given["model"]) or hasattr(given["model"], "peft_config"):
        raise ValueError(f"the model is a PEFT model already, but {holds}, which belong below PEFT; load the base "
                         "again, register it, and load this directory first")  # fmt: skip


def _load(model: Any, directory: Path, name: str, is_trainable: bool) -> Any:
    """Everything in the directory onto a registered base, in place. On an error the base is as it was."""
    decoder = get_decoder(model)
    registered: Registered = decoder.hici_dropin
    apply_constants(decoder)
    contents = read_contents(directory, name)
    _check_shapes(model, contents, registered.module)
    plan = make_plan(
        contents,
        model.config,
        context_length=_context(contents, model.config, registered.module),
        config=hici_config(model).to_dict(),
    )
    _check_fingerprint(model, contents)
    wrapped = install(model, plan)
    wrapped.requires_grad_(False)
    if is_trainable:
        if is_peft(wrapped):
            wrapped.peft_config["default"].inference_mode = False
        trained = (".lora_", ".modules_to_save.")
        for key, parameter in wrapped.named_parameters():
            parameter.requires_grad_(is_hici_name(key) or any(part in key for part in trained))
        return wrapped
    return wrapped.eval()


def _check_shapes(model: Any, contents: Contents, module: str) -> None:
    """Raise ValueError when the modules were registered with other shapes than the directory's."""
    # the number of heads is in no tensor; 1 divides every width
    found = config_of(contents, None if contents.record is not None else {"num_heads": 1})
    registered = hici_config(model)
    wrong = []
    for field, argument in _REGISTER_NAMES.items():
        mine, theirs = getattr(registered, field), getattr(found, field)
        if field == "num_heads" and contents.record is None:
            continue
        if field == "global_width" and registered.compress_dim is not None and registered.bottleneck_dim is not None:
            continue  # the shared compressor's width is bottleneck_dim
        if mine != theirs:
            wrong.append(f"{argument}={_said(field, mine)}, but {contents.directory} has {_said(field, theirs)}")
    if wrong:
        raise ValueError(f"{module}: the model was registered with {'; '.join(wrong)}. Load the base again and "
                         "register it with the directory's values")  # fmt: skip


def _said(field: str, value: int | None) -> str:
    without = {"bottleneck_dim": "none (use_bottleneck=False)", "compress_dim": "none (use_shared_compressor=False)"}
    return without[field] if value is None else str(value)


def _context(contents: Contents, model_config: Any, module: str) -> int | None:
    """The context for `make_plan`; None: the directory records it.

    Raises:
        ValueError: nothing tells it, or CONTEXT_LENGTH contradicts the record.
    """
    given = importlib.import_module(module).CONTEXT_LENGTH
    if given is not None:
        positive_integer(module, "CONTEXT_LENGTH", given)
    if contents.record is not None:
        recorded = contents.record.context_length
        if given not in (None, recorded):
            raise ValueError(f"{module}.CONTEXT_LENGTH={given}, but {contents.directory} records {recorded}; set it "
                             "to None")  # fmt: skip
        return None
    told = given or context_of_name(contents.name) or _context_set_by_hand(model_config)
    if told is None:
        raise ValueError(
            f"{contents.name} does not tell the context that it was trained for, which rope needs: no file of the "
            "released format holds it, and the name does not end like -16k; set it before loading: "
            f"{module}.CONTEXT_LENGTH = 16384 (for 16k)"
        )
    return told


def _context_set_by_hand(model_config: Any) -> int | None:
    """What a base reaches whose rope was scaled before it was loaded, as the published scripts do."""
    rope = model_config.rope_parameters
    if rope.get("rope_type") != "linear" or rope["factor"] <= 1:
        return None
    return round(rope["factor"] * model_config.max_position_embeddings)


def _check_fingerprint(model: Any, contents: Contents) -> None:
    """Whether the base is the recorded one: as it is, or as it was when it was registered."""
    record = contents.record
    if record is None:
        return
    known = {base_fingerprint(model), get_decoder(model).hici_attached.base_fingerprint}
    if record.base_fingerprint in known:
        return
    resized = record.vocab_size is not None and record.vocab_size == vocabulary_size(model)
    if resized or "unknown" in {record.base_fingerprint, *known}:
        logger.warning("%s: whether the base is the right one is checked by names and shapes only, since its "
                       "vocabulary was resized, or it is quantised", contents.directory)  # fmt: skip
        return
    raise ValueError(
        f"{contents.directory} was made on {record.base_model!r} (fingerprint {record.base_fingerprint}), but this "
        f"base is {model.config.name_or_path!r} ({base_fingerprint(model)}); give the base that it was made on"
    )
