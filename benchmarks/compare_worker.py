"""One training or one evaluation of `compare.py`, in a process of its own, so that its peak memory is its own.

    python benchmarks/compare_worker.py train SPEC.json RESULT.json
    python benchmarks/compare_worker.py evaluate SPEC.json RESULT.json

SPEC.json is what compare.py wrote; RESULT.json appears when all is done, and holds the hash of its spec.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare_setup import spec_key
from hici.files import read_json, write_json, write_text


def main() -> None:
    task, spec_file, result_file = sys.argv[1:]
    spec = read_json(spec_file)
    result = {"train": train_one, "evaluate": evaluate}[task](spec)
    write_json(result_file, {"spec": spec_key(spec), **result})


# ---- training


class StepRecorder:
    """Time and tokens of every optimizer step, taken from outside of the trainer, by torch's own hooks.

    A line of `file` a step: its number by the optimizer's count, `seconds` (a GPU's work included; the next one's hold
    the time of a checkpoint), `seen` (a hash over the token ids that went into the embeddings) and `tokens` (how many
    they were). A run that goes on from a checkpoint goes on in the same file; a step that was made again counts once.
    """

    def __init__(self, file: Path, *, resume: bool) -> None:
        self.file = file
        self.parent = os.getppid()
        self._last: float | None = None
        self._hash, self._tokens = hashlib.sha256(), 0
        write_text(file, "".join(f"{json.dumps(line)}\n" for line in self.lines()) if resume else "")

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the file; the last one may be cut where a process was killed."""
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Steps 1 to `count`. Raises ValueError when one is missing, or there are others."""
        by_number = {line["step"]: line for line in self.lines()}
        if sorted(by_number) != list(range(1, count + 1)):
            raise ValueError(f"optimizer steps {sorted(by_number)} were seen, but max_steps={count}; train anew in "
                             "another --scratch")  # fmt: skip
        return [by_number[step] for step in range(1, count + 1)]

    def see(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before every module's forward pass: what the embeddings get in training."""
        import torch

        if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
            return
        if self._last is None:
            self._last = time.perf_counter()
        ids = inputs[0].detach().cpu().contiguous().long()
        self._hash.update(ids.numpy().tobytes())
        self._tokens += ids.numel()

    def end_step(self, optimizer: Any, *args: Any) -> None:
        """After every step of an optimizer."""
        import torch

        if os.getppid() != self.parent:  # it was killed; started again, it would run this training twice at once
            sys.exit("compare.py is gone: stopped")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        assert self._last is not None, "an optimizer step without tokens"
        number = int(next(iter(optimizer.state.values()))["step"])
        line = {"step": number, "seconds": now - self._last, "seen": self._hash.hexdigest()[:16],
                "tokens": self._tokens}  # fmt: skip
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(f"{json.dumps(line)}\n")
        self._last, self._hash, self._tokens = now, hashlib.sha256(), 0
        print(f"step {number}: {line['seconds']:.2f} s", flush=True)

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

    recipe = recipe_from_dict(spec["recipe"])
    # a profile has no checkpoints, and begins anew
    resume = recipe.save_steps > 0
    recorder = StepRecorder(Path(recipe.output_dir).parent / "steps.jsonl", resume=resume)
    with recorder.recording():
        result = train(recipe, resume=resume, progress=False)
    if result["attention"] != recipe.method:
        raise ValueError(
            f"trained in attention {result['attention']!r}, but the recipe's method is {recipe.method!r}: this would "
            "compare something else than it says"
        )
    steps = recorder.steps(recipe.max_steps)
    return {
        "adapter": result["adapter"],
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "step_seconds": [step["seconds"] for step in steps],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "losses": [entry["loss"] for entry in result["steps"] if "loss" in entry],
        "seen": [step["seen"] for step in steps],
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

    from hici.data.documents import map_token_file
    from hici.eval.perplexity import perplexity
    from hici.models.lookup import get_causal_lm
    from hici.models.modes import set_attention

    logging.disable_progress_bar()
    on_gpu = spec["device"] != "cpu" and torch.cuda.is_available()
    model = _load(spec).to("cuda" if on_gpu else "cpu")
    stream = map_token_file(Path(spec["test"]), get_causal_lm(model).config.vocab_size).astype("int64")
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
