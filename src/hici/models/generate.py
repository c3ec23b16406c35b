"""Text from a prompt, in the attention mode that the model is in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hici.models.lookup import get_causal_lm
from hici.rope import check_context


@dataclass(frozen=True)
class Generation:
    """What was generated: new text and tokens, and wall time in seconds (prompt and new tokens together)."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float
    ended: bool  # at an end-of-text token, and not at max_new_tokens


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> Any:
    """Token ids [1, tokens], with the tokenizer's special tokens, or as one user message of its chat template.

    Raises:
        ValueError: an empty prompt; `chat` without a chat template.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word")
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("chat is asked for, but the tokenizer has no chat template; give a plain prompt")
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]
    return tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    input_ids_1T: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    allow_beyond_rope: bool = False,
    streamer: Any = None,
) -> Generation:
    """Continue a prompt.

    In attention mode "hici" the prompt is read with segments and slots; every new token then attends to the raw keys
    of all tokens before it, without slots. Settings in the model's own generation config other than its special
    tokens are not used: what is given here is what happens.

    Args:
        input_ids_1T: the prompt, see `encode_prompt`.
        temperature: 0: greedy, always the most probable token.
        top_p: draw from the smallest set of tokens with this much probability; 1: from all.
        seed: of the draws; the process's random state is left as it was.
        streamer: a transformers streamer.

    Raises:
        ValueError: a temperature below 0, top_p outside of (0, 1], more tokens than the model's rope represents.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    lm = get_causal_lm(model)
    prompt_tokens = input_ids_1T.shape[1]
    if not allow_beyond_rope:
        check_context(lm.config, prompt_tokens + max_new_tokens)
    ids = input_ids_1T.to(lm.device)
    settings = _settings(lm, tokenizer, max_new_tokens, temperature, top_p)
    devices = [lm.device] if lm.device.type == "cuda" else []
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(), _only_settings(lm, settings):
        torch.manual_seed(seed)
        out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    tokens = out[0, prompt_tokens:].tolist()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        seconds=time.perf_counter() - begin,
        ended=bool(tokens) and tokens[-1] in ends,
    )


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ValueError on impossible settings."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1; give at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a number >= 0; give 0 (greedy) or for example 0.7")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; give 1 (all tokens) or for example 0.9")


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
    from transformers import GenerationConfig

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
