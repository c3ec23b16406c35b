"""One training or one evaluation of `compare.py`, in a process of its own, so that its peak memory is its own.

    python benchmarks/compare_worker.py train SPEC.json RESULT.json
    python benchmarks/compare_worker.py evaluate SPEC.json RESULT.json

SPEC.json is what compare.py wrote; RESULT.json appears when all is done, and holds the hash of its spec.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare_setup import spec_key
from hici.files import read_json, write_json


def main() -> None:
    task, spec_file, result_file = sys.argv[1:]
    spec = read_json(spec_file)
    result = {"train": train_one, "evaluate": evaluate}[task](spec)
    write_json(result_file, {"spec": spec_key(spec), **result})


# ---- training


class StepRecorder:
    """Time and tokens of every optimizer step, taken from outside of the trainer, by torch's own hooks.

    `begin`, `seconds`: when the first step began, and how long each took (a GPU's work included); `seen`: SHA-256 over
    the token ids that went into the embeddings in each step; `tokens`: how many they were.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.seen: list[str] = []
        self.tokens = 0
        self.parent = os.getppid()
        self._last: float | None = None
        self._hash = hashlib.sha256()

    def see(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before every module's forward pass: what the embeddings get in training."""
        import torch

        if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
            return
        if self._last is None:
            self._last = time.perf_counter()
        ids = inputs[0].detach().cpu().contiguous().long()
        self._hash.update(ids.numpy().tobytes())
        self.tokens += ids.numel()

    def end_step(self, *args: Any) -> None:
        """After every step of an optimizer."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if os.getppid() != self.parent:  # it was killed; started again, it would run this training twice at once
            sys.exit("compare.py is gone: stopped")
        now = time.perf_counter()
        assert self._last is not None, "an optimizer step without tokens"
        self.seconds.append(now - self._last)
        self.seen.append(self._hash.hexdigest()[:16])
        self._last, self._hash = now, hashlib.sha256()
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        hooks = [register_module_forward_pre_hook(self.see), register_optimizer_step_post_hook(self.end_step)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def train_one(spec: dict[str, Any]) -> dict[str, Any]:
    """Train the spec's recipe; what it took, what it saw, and where the adapter is.

    Raises:
        ValueError: as `hici.train.run.train`; it trained in another attention or other steps than the recipe says.
    """
    from hici.train.recipe import recipe_from_dict
    from hici.train.run import train

    recipe, recorder = recipe_from_dict(spec["recipe"]), StepRecorder()
    with recorder.recording():
        result = train(recipe, progress=False)
    if result["attention"] != recipe.method:
        raise ValueError(
            f"trained in attention {result['attention']!r}, but the recipe's method is {recipe.method!r}: this would "
            "compare something else than it says"
        )
    if len(recorder.seconds) != recipe.max_steps:
        raise ValueError(f"{len(recorder.seconds)} optimizer steps were seen, but max_steps={recipe.max_steps}")
    return {
        "adapter": result["adapter"],
        "steps": len(recorder.seconds),
        "tokens": recorder.tokens,
        "seconds": result["seconds"],
        "step_seconds": recorder.seconds,
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "losses": [entry["loss"] for entry in result["steps"] if "loss" in entry],
        "seen": recorder.seen,
        "made_with": result["made_with"],
    }


# ---- evaluation


def evaluate(spec: dict[str, Any]) -> dict[str, Any]:
    """Perplexity runs of one model at all lengths, in each of the spec's attentions.

    The spec: `adapter`, or `base` and `extend_rope` (positions, or None: beyond the base's own ones by its own rope);
    `test` (a token file), `lengths`, `windows` (at most, a length), `attentions`, `precision`, `device`.
    """
    import torch
    from transformers.utils import logging

    from hici.data.documents import read_tokens
    from hici.eval.perplexity import perplexity
    from hici.models.lookup import get_causal_lm
    from hici.models.modes import set_attention

    logging.disable_progress_bar()
    on_gpu = spec["device"] != "cpu" and torch.cuda.is_available()
    model = _load(spec).to("cuda" if on_gpu else "cpu")
    stream = read_tokens(Path(spec["test"]), get_causal_lm(model).config.vocab_size)
    beyond = "base" in spec and spec["extend_rope"] is None
    runs = []
    # float32 weights in either case: bfloat16 ones would round what was learned
    with torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=spec["precision"] == "bfloat16"):
        for attention in spec["attentions"]:
            set_attention(model, attention)
            for length in spec["lengths"]:
                run = perplexity(model, stream, length, max_windows=spec["windows"], allow_beyond_rope=beyond)
                print(f"{attention}, {length:,} tokens: ppl {run.ppl:.3f}, {run.seconds:.0f} s", flush=True)
                if run.leaks_future:
                    raise ValueError(f"attention {attention} of visibility {run.visibility} sees the future")
                runs.append(run.to_dict())
    return {"runs": runs}


def _load(spec: dict[str, Any]) -> Any:
    import torch

    import hici
    from hici.models.load import load_plain_model

    if "adapter" in spec:
        return hici.from_pretrained(spec["adapter"], dtype=torch.float32)
    model = load_plain_model(spec["base"], dtype=torch.float32)
    return model if spec["extend_rope"] is None else hici.extend_rope(model, spec["extend_rope"], spec["rope"])


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # compare.py shows the last line
        sys.exit(f"{type(error).__name__}: {error}")
