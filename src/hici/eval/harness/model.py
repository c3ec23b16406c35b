"""The model type "hici" of lm-evaluation-harness: any model that hici opens, in any of its attention modes.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from hici.adapters.open import model_kind, open_model, open_tokenizer
from hici.eval.conditions import attention_label, describe_condition
from hici.models.cache import HiCICache
from hici.models.load import floating_dtype
from hici.models.lookup import FULL, HICI, attention_mode, get_causal_lm, get_decoder, hici_config
from hici.models.loss import token_scores
from hici.models.modes import ATTENTIONS, leaks_future, set_attention
from hici.processes import world_size
from hici.registry import suggest
from hici.rope import check_context

logger = logging.getLogger(__name__)

_OPENING = ("base_model", "context_length", "num_heads", "segment_size", "num_segments", "visibility", "slots")
_HARNESS = ("add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args")
Request = tuple[Any, list[int], list[int]]  # (key, tokens of the context, tokens of the continuation)


class _Outline(NamedTuple):
    """What lm-eval's `hf` is set up with: of a model itself it would tie the weights, which PEFT's copies forbid."""

    device: torch.device
    config: Any


@register_model("hici")
class HiCIModel(HFLM):
    """lm-eval's `hf`, with hici's loading and attention modes.

    Log-likelihoods: a softmax in float32, from the hidden states of the scored tokens alone: no [B, T, vocabulary]
    logits are held, and one input with several last tokens (answers of one token) is read once.

    Attributes:
        truncated: requests whose beginning was cut off so far, since they are longer than `max_length`.
    """

    def __init__(
        self,
        pretrained: Any,
        attention: str | None = None,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        allow_beyond_rope: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        """Opens and prepares the model.

        Args:
            pretrained: name of a model (an adapter, merged, or plain), or a loaded one with `tokenizer`.
            attention: "full", "hici" or "hici_s2"; None: a loaded model's present one, else "full".
            tokenizer: loaded, or a name; None: the model's own. A copy is used.
            dtype, device: for a name; "auto": as the weights are stored; None: cuda where it is, else cpu.
            batch_size: texts read together, a number.
            max_length: tokens that are read at most; None: the model's positions.
            allow_beyond_rope: permit a max_length beyond them.
            progress: bars on stderr.
            settings: for a name: base_model, context_length, num_heads, segment_size, num_segments, visibility, slots
                (see `hici.adapters.open.open_model`). Always: add_bos_token, prefix_token_id, think_end_token,
                enable_thinking, chat_template_args (see lm-eval's `hf`).

        Raises:
            ValueError: what the model does not go with; several texts at once where segments depend on the batch.
        """
        batch_size = _checked_batch_size(batch_size)
        opening, harness = _sorted_settings(settings)
        if isinstance(pretrained, str):
            model, own = _opened(os.path.expanduser(pretrained), attention or FULL, dtype, device, opening)
        else:
            model, own = pretrained, None
            _refuse_for_loaded(tokenizer, opening)
        if attention is not None:
            set_attention(model, attention)
        _check_batch(model, batch_size)
        lm = get_causal_lm(model)
        if max_length is not None and not allow_beyond_rope:
            check_context(lm.config, max_length)
        with _quiet(logging.getLogger("lm_eval.models.huggingface")):  # its warnings against loaded models
            super().__init__(
                pretrained=_Outline(lm.device, lm.config),
                backend="causal",
                tokenizer=_checked_tokenizer(own if tokenizer is None else tokenizer),
                batch_size=batch_size,
                max_length=max_length or lm.config.max_position_embeddings,
                **harness,
            )
        self._model = lm.eval()  # with the adapters in it
        self.pretrained = lm.config.name_or_path
        self.progress = progress
        self._allow_beyond_rope = allow_beyond_rope
        self.truncated = 0
        if leaks_future(model):
            logger.warning(
                "attention %s: a token sees a summary of its own future, so no log-likelihood is one of a language "
                "model; use visibility 'past', or attention 'full'", attention_label(describe_condition(model, None)),
            )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into its results' config: the attention among it, with "(not causal)" where it is so."""
        condition = describe_condition(self.model, None)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "hici": {**condition, "label": attention_label(condition)},
        }

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in lm-eval: (log-likelihood of the continuation in nats, whether greedy decoding gives it)."""
        for request in requests:
            context, continuation = request.args
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise ValueError(
                    f"the task {request.task_name} scores {continuation!r} behind an empty text, which are no tokens; "
                    "look for an empty text in the task's data"
                )
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in lm-eval: log-likelihood of each text in nats, in windows of `max_length` tokens."""
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self.progress))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in lm-eval. Raises ValueError where the tokens asked for leave no room for a prompt."""
        for request in requests:
            asked = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if asked >= self.max_length:
                raise ValueError(
                    f"the task {request.task_name} asks for {asked} new tokens, but the model reads {self.max_length} "
                    "with the prompt; give a larger max_length, or a smaller max_gen_toks in the task"
                )
        with torch.no_grad():
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm or not self.progress))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        """As in lm-eval; in bounded memory also beyond the rope, where that is permitted."""
        bounded = attention_mode(self.model) == HICI and hici_config(self.model).bounded_decode
        if self._allow_beyond_rope and bounded:
            settings["past_key_values"] = HiCICache(self.model, allow_beyond_rope=True)
        return super()._model_generate(context, max_length, stop, **settings)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As in lm-eval; prompts that are cut are counted."""
        ids_BT, mask_BT = super().tok_batch_encode(strings, padding_side, None, truncation)
        if not mask_BT.any(1).all():
            empty = strings[int(mask_BT.any(1).long().argmin())]
            raise ValueError(f"the prompt {empty!r} has no tokens, so nothing can follow it; look for an empty text in "
                             "the task's data")  # fmt: skip
        if left_truncate_len is not None and ids_BT.shape[1] > left_truncate_len:
            assert padding_side == "left", "prompts are padded on the left"
            self._count_truncated(int(mask_BT[:, :-left_truncate_len].any(1).sum()))
            ids_BT, mask_BT = ids_BT[:, -left_truncate_len:], mask_BT[:, -left_truncate_len:]
        return ids_BT, mask_BT

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether every token of it is the likeliest one) of every request."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            by_input.setdefault(self._input(context, continuation), []).append(number)
        order = sorted(by_input, key=lambda tokens: (-len(tokens), tokens))  # what takes most memory comes first
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm or not self.progress, desc="log-likelihoods") as bar:
            for first in range(0, len(order), size):
                batch = order[first : first + size]
                hidden_BTD = self._hidden(batch)
                for hidden_TD, tokens in zip(hidden_BTD, batch, strict=True):
                    for number in by_input[tokens]:
                        key, _, continuation = requests[number]
                        answer = self._answer(hidden_TD[: len(tokens)], continuation)
                        answers[number] = answer
                        if key is not None:  # windows of a long text have none
                            self.cache_hook.add_partial("loglikelihood", key, answer)
                    bar.update(len(by_input[tokens]))
        return [answer for answer in answers if answer is not None]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads: the last `max_length` tokens, without the very last, which is only predicted."""
        if not context or not continuation:
            raise ValueError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; both need one at "
                "least: look for an empty text in the task's data"
            )
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, but the model reads {self.max_length}; give a larger "
                "max_length, or a task with shorter answers"
            )
        tokens = tuple(context + continuation)
        if len(tokens) > self.max_length + 1:
            self._count_truncated(1)
        return tokens[-(self.max_length + 1) :][:-1]

    @torch.no_grad()
    def _hidden(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Last hidden states [B, T, D] of texts padded on the right."""
        longest = max(len(tokens) for tokens in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, tokens in enumerate(batch):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
            mask_BT[row, : len(tokens)] = 1
        inputs = {"input_ids": ids_BT.to(self.device)}
        # stock attention is causal, and hides what stands behind a text; slots would summarise it
        if attention_mode(self.model) != FULL and not mask_BT.all():
            inputs["attention_mask"] = mask_BT.to(self.device)
        hidden: Tensor = get_decoder(self.model)(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _answer(self, hidden_TD: Tensor, continuation: list[int]) -> tuple[float, bool]:
        scores, likeliest = token_scores(self.model, hidden_TD[-len(continuation) :], torch.tensor(continuation))
        return scores.cpu().double().sum().item(), bool(likeliest.all())

    def _count_truncated(self, requests: int) -> None:
        if requests and not self.truncated:
            logger.warning(
                "requests longer than max_length=%d lose their beginning; the result counts them", self.max_length
            )
        self.truncated += requests


def _checked_batch_size(batch_size: int | str) -> int:
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size={batch_size!r}; give a number of texts, at least 1 (lm-eval's search for the "
                         "largest one, auto, is for its own models)")  # fmt: skip
    return size


def _check_batch(model: Any, batch_size: int) -> None:
    """A result must not depend on what a text is batched with."""
    if batch_size == 1 or attention_mode(model) == FULL or hici_config(model).segment_size is not None:
        return
    raise ValueError(
        f"batch_size={batch_size} with num_segments={hici_config(model).num_segments}: segments of ceil(T / "
        "num_segments) tokens of the padded batch, so that a text's result would depend on the texts beside "
        "it; give segment_size (--segment-size), or batch_size=1"
    )


def _sorted_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of opening a model, those of lm-eval's `hf`)."""
    for name in settings:
        if name not in (*_OPENING, *_HARNESS):
            known = ("pretrained", "attention", "tokenizer", "dtype", "device", "batch_size", "max_length",
                     "allow_beyond_rope", "progress", *_OPENING, *_HARNESS)  # fmt: skip
            raise ValueError(suggest(name, known, "argument of lm-eval's model 'hici'"))
    return tuple({k: v for k, v in settings.items() if k in names} for names in (_OPENING, _HARNESS))  # type: ignore[return-value]


def _checked_tokenizer(tokenizer: Any) -> Any:
    """A copy, since lm-eval gives it a padding token where it has none."""
    if isinstance(tokenizer, str):
        tokenizer = open_tokenizer(os.path.expanduser(tokenizer), "plain")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no EOS token, with which lm-eval begins and ends "
                         "texts; set tokenizer.eos_token")  # fmt: skip
    return copy.deepcopy(tokenizer)


def _opened(name: str, attention: str, dtype: str, device: str | None, opening: dict[str, Any]) -> tuple[Any, Any]:
    """(model, its own tokenizer)."""
    if world_size() > 1:
        raise ValueError(
            f"{world_size()} processes, and in each of them lm-eval would measure everything; run one process, or "
            "`torchrun ... -m hici eval lm`, which shares the tasks"
        )
    if attention not in ATTENTIONS:
        raise ValueError(suggest(attention, ATTENTIONS, "attention"))
    _check_slots(attention, opening)
    floating_dtype(dtype)
    kind = model_kind(name)
    model = open_model(
        name,
        kind,
        (attention,),
        dtype=None if dtype == "auto" else dtype,
        device=_checked_device(device),
        **opening,
    )
    return model, open_tokenizer(name, kind, opening.get("base_model"))


def _checked_device(device: str | None) -> str:
    """Where there is no CUDA device, the CPU, as with lm-eval's `hf`: its command asks for "cuda:0" by itself."""
    if torch.cuda.is_available():
        return device or "cuda"
    if device is not None and device.startswith("cuda"):
        logger.warning("device %s: torch has no CUDA device here; going on with the CPU", device)
        return "cpu"
    return device or "cpu"


def _check_slots(attention: str, opening: dict[str, Any]) -> None:
    """Raise ValueError for settings of segments and slots that would change nothing."""
    slots = opening.get("slots", True)
    names = ("segment_size", "num_segments", "visibility")
    given = [f"{name}={opening[name]}" for name in names if opening.get(name) is not None]
    given += [] if slots else ["slots=False"]
    if given and attention == FULL:
        raise ValueError(f"{given[0]} changes nothing in attention full; give attention=hici, or drop it")
    if opening.get("visibility") is not None and (attention != HICI or not slots):
        raise ValueError(f"visibility={opening['visibility']}, but there is no slot to see; drop it, or give "
                         "attention=hici without slots=False")  # fmt: skip


def _refuse_for_loaded(tokenizer: Any, opening: dict[str, Any]) -> None:
    if tokenizer is None:
        raise ValueError("a loaded model without its tokenizer; give tokenizer=, or the model's name")
    for name, value in opening.items():
        raise ValueError(f"{name}={value} is for a model that is given by its name, but this one is loaded; set it on "
                         "the model (hici.reconfigure), and leave it out here")  # fmt: skip


@contextlib.contextmanager
def _quiet(harness_logger: logging.Logger) -> Iterator[None]:
    level = harness_logger.level
    harness_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness_logger.setLevel(level)
