"""One prompt, answered by a model."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F

from hici.eval.retrieval.base import Score
from hici.eval.retrieval.fit import Prompt
from hici.machine import measured_peak
from hici.models.generate import generate
from hici.models.session import Session, common_length
from hici.rope import changes_between


def answer_prompt(
    model: Any, tokenizer: Any, prompt: Prompt, with_answer: list[int], score: Score, *, allow_beyond_rope: bool
) -> dict[str, Any]:
    """What the model says, greedily, and how good it is; everything is read anew.

    Args:
        with_answer: tokens of the prompt and the expected answer behind it, for `answer_loss` (where there is one
            answer).
        allow_beyond_rope: see `Session`.
    """
    with measured_peak(model.device) as peak:
        begin = time.perf_counter()
        session = Session(model, allow_beyond_rope=allow_beyond_rope)
        loss = answer_loss(session, prompt.ids, with_answer) if len(prompt.expected) == 1 else None
        made = generate(session, tokenizer, prompt.ids, max_new_tokens=prompt.max_new_tokens)
        seconds = time.perf_counter() - begin
        del session
    points = score(made.text, prompt.expected)
    return {
        "expected": prompt.expected[0] if len(prompt.expected) == 1 else list(prompt.expected),
        "answer": made.text,
        "correct": points == 1,
        "score": points,
        "answer_loss": loss,
        "prompt_tokens": len(prompt.ids),
        "max_new_tokens": prompt.max_new_tokens,
        "answer_tokens": len(made.tokens),
        "prompt_sha256": prompt.sha256,
        "seconds": seconds,
        "peak_memory_bytes": peak.bytes,
    }


@torch.inference_mode()
def answer_loss(session: Session, ids: list[int], with_answer: list[int]) -> float | None:
    """Mean nats a token of the answer behind a prompt, when the model is told the right one token by token.

    The prompt stays read in the session, so that this costs the answer's tokens only. None where a session holds
    nothing (decode over raw keys; with visibility all or current the slots would tell the answer besides), and where
    the answer reaches into another rope than its prompt's.

    Raises:
        ValueError: a loss that is not finite.
    """
    known = common_length(ids, with_answer)  # the first of the answer's letters may merge into the prompt's last token
    assert 0 < known < len(with_answer)
    if session.cache is None or changes_between(session.model.config, known - 1, len(with_answer)):
        return None
    session.read(with_answer[: known - 1])
    session.keep(passing=True)
    tail = torch.tensor(with_answer[known - 1 :], device=session.model.device)
    logits = session.model(input_ids=tail[None, :-1], past_key_values=session.cache, use_cache=True).logits
    session.after_generation(with_answer[:-1])
    loss = F.cross_entropy(logits[0].float(), tail[1:]).item()
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of an answer is {loss}; a model with sound weights gives finite ones: check the weights, or "
            "compute in float32 (--dtype float32)"
        )
    return loss
