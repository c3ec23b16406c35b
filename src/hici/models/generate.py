"""Text from a prompt, in the attention mode that the model is in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from hici.models.session import Session

LOWEST_TEMPERATURE = 1e-3  # below, logits divided by it overflow


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text, tokens: new text and tokens.
        prompt_tokens: all tokens before them.
        read_tokens: those of the prompt that were read now, and not before in the same session.
        read_seconds: until the first new token was there.
        seconds: of the others.
        ended: at an end-of-text token, and not at max_new_tokens.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    read_tokens: int
    read_seconds: float
    seconds: float
    ended: bool

    @property
    def tokens_per_second(self) -> float | None:
        """Of new tokens behind the first; None with one."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else None


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids, with the tokenizer's special tokens, or as one user message of its chat template.

    Raises:
        ValueError: an empty prompt; `chat` without a chat template.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word")
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(prompt, verbose=False)["input_ids"])


def encode_messages(tokenizer: Any, messages: list[dict[str, str]], *, answer: bool = True) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, ready for the assistant's answer (or as it is).

    Raises:
        ValueError: no chat template, or one that refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat is asked for, but the tokenizer has no chat template; give a plain prompt "
                         "(`hici generate` without --chat)")  # fmt: skip
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=answer, return_dict=True)
    except jinja2.TemplateError as error:
        remedy = (
            "put the system message into the question" if messages[0]["role"] == "system" else "give a plain prompt"
        )
        raise ValueError(f"the tokenizer's chat template refuses the messages ({error}); {remedy}") from error
    return list(encoded["input_ids"])


def generate(
    session: Session,
    tokenizer: Any,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    streamer: Any = None,
    settled: int | None = None,
    stop_tokens: Sequence[int] = (),
    min_new_tokens: int = 0,
) -> Generation:
    """Continue a prompt; what the session has read of it is not read again.

    Settings in the model's own generation config other than its special tokens are not used: what is given here is
    what happens.

    Args:
        ids: the whole prompt, see `encode_prompt`.
        temperature: 0: greedy, always the most probable token.
        top_p: draw from the smallest set of tokens with this much probability; 1: from all.
        seed: of the draws; the process's random state is left as it was.
        streamer: a transformers streamer.
        settled: tokens of the prompt (fewer than all) behind which the session keeps a passing place.
        stop_tokens: end the text as its end-of-text token does; they stay in it.
        min_new_tokens: no end before so many.

    Raises:
        ValueError: a temperature below 0, top_p outside of (0, 1], more tokens than the model's rope represents.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    lm = session.model
    session.check_length(len(ids) + max_new_tokens)
    settings = _settings(lm, tokenizer, max_new_tokens, temperature, top_p)
    if stop_tokens:
        settings.eos_token_id = [*_as_list(settings.eos_token_id), *stop_tokens]
    if min_new_tokens:
        settings.min_new_tokens = min_new_tokens
    prompt = torch.tensor([ids], device=lm.device)
    devices = [lm.device] if lm.device.type == "cuda" else []
    begin = time.perf_counter()
    read = len(ids)
    if session.cache is not None:
        read = 1
        if settled is not None:
            read += session.read(ids[:settled])
            session.keep(passing=True)
        read += session.read(ids[:-1])
    first = _FirstToken()
    with (
        session.recovering(),
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(),
        _only_settings(lm, settings),
    ):
        torch.manual_seed(seed)
        out = lm.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=session.cache,
            stopping_criteria=StoppingCriteriaList([first]),
            streamer=streamer,
        )[0].tolist()
    end = time.perf_counter()
    session.after_generation(out)
    tokens = out[len(ids) :]
    ends = _as_list(settings.eos_token_id)
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=len(ids),
        read_tokens=read,
        read_seconds=first.time - begin,
        seconds=end - first.time,
        ended=bool(tokens) and tokens[-1] in ends,
    )


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise ValueError on impossible settings."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1; give at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a number >= 0; give 0 (greedy) or for example 0.7")
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"temperature={temperature} is too near to 0 to divide by; give 0 (greedy) or at least "
                         f"{LOWEST_TEMPERATURE}")  # fmt: skip
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; give 1 (all tokens) or for example 0.9")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is not an integer from 0 to 2**63 - 1; give one")


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first new token was there."""

    time = 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.time = self.time or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _only_settings(lm: Any, settings: Any) -> Iterator[None]:
    """The model's generation config is `settings`: given as an argument, its empty fields take the model's values."""
    own = lm.generation_config
    lm.generation_config = settings
    try:
        yield
    finally:
        lm.generation_config = own


def _settings(lm: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    own = lm.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=1, repetition_penalty=1.0, **sampling)
    settings.bos_token_id, settings.eos_token_id = own.bos_token_id, eos
    settings.pad_token_id = pad if pad is not None else (eos[0] if isinstance(eos, list) else eos)
    return settings


def _as_list(token: int | list[int] | None) -> list[int]:
    if token is None:
        return []
    return token if isinstance(token, list) else [token]
